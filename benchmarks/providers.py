"""Who computes a measure: naive code, public packages, and every backend of rift_kernels.

A provider that cannot run here stays in the list and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import rift_kernels
from rift_kernels.dispatch import availability, plan

from . import baselines, flops
from .workloads import AUTOTUNED, CKA_MEASURES, COMPILED, Inputs, Workload, dtype_name

Pair = Callable[[Tensor, Tensor], Tensor]

NAIVE = "naive eager"
WIDE, TF32, HALF = f"{NAIVE} float32", f"{NAIVE} TF32", f"{NAIVE} bfloat16"
HAND_DERIVED = "hand-derived"
PACKAGES = {"ckatorch": "ckatorch", "pytorch-cka": "cka"}  # and their modules
OURS = "rift_kernels "
_OURS: dict[str, Callable[..., Tensor]] = {
    "cka_biased": partial(rift_kernels.linear_cka, debiased=False),
    "cka_debiased": rift_kernels.linear_cka,
    "procrustes": rift_kernels.procrustes_similarity,
    "covariance": rift_kernels.covariance_distance,
    "bures": rift_kernels.bures_distance,
}


@dataclass(frozen=True)
class Provider:
    """An implementation of some measures."""

    name: str
    measures: Mapping[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)
    reason: str | None = None  # why it cannot run here
    flops: Callable[[Workload], float | None] = lambda _: None
    products_in: torch.dtype | None = None  # None: the features' dtype
    takes: Callable[[Workload], bool] = lambda _: True  # of the workloads of its measures
    settings: Callable[[], AbstractContextManager[None]] = nullcontext  # of forward and backward

    def can_do(self, workload: Workload) -> bool:
        return self.reason is None and workload.measure in self.measures and self.takes(workload)

    def predicted(self, workload: Workload, peaks: Mapping[str, float]) -> float | None:
        """Seconds of its products, at the peak of the dtype that it multiplies in."""
        count, dtype = self.flops(workload), self.products_in or workload.dtype
        return None if count is None else count / peaks[dtype_name(dtype)]


def providers(device: torch.device, compiled: Sequence[str] = (COMPILED,)) -> list[Provider]:
    """All providers, in the order of their turn when time is short.

    ``compiled`` are the modes of torch.compile to include; each needs seconds for every shape.
    """
    on_gpu = device.type == "cuda"
    by_hand, hand_dtype = baselines.HandDerivedCKA.apply, None if on_gpu else torch.float32
    wide, half = _cast(torch.float32), _cast(torch.bfloat16)
    no_tf32 = None if on_gpu else "TF32 needs a GPU"
    return [
        _pairwise(NAIVE, baselines.NAIVE, flops.naive),
        *map(_ours, availability.BACKENDS),
        _pairwise(HAND_DERIVED, {"cka_biased": by_hand}, flops.hand_derived, hand_dtype),
        _pairwise(WIDE, wide, flops.naive, torch.float32, takes=lambda w: w.dtype.itemsize == 2),
        _pairwise(HALF, half, flops.naive, torch.bfloat16, takes=lambda w: w.dtype.itemsize == 4),
        _pairwise(TF32, wide, flops.naive, torch.float32, reason=no_tf32, settings=_tf32),
        _pairwise("ckatorch", {"cka_biased": _ckatorch}, flops.ckatorch, torch.float64),
        _pairwise("pytorch-cka", {"cka_debiased": _pytorch_cka}, flops.pytorch_cka),
        *map(_compiled, compiled),
    ]


def _pairwise(
    name: str,
    functions: Mapping[str, Pair],
    operations: Callable[[Workload], float | None],
    products_in: torch.dtype | None = None,
    **fields: Any,
) -> Provider:
    """One call a layer on the valid rows, as a user of a function of two features has to."""

    def values(function: Pair, inputs: Inputs) -> Tensor:
        pairs = list(zip(inputs.students, inputs.teachers, strict=True))
        if inputs.mask is not None:
            pairs = [(x[inputs.mask], y[inputs.mask]) for x, y in pairs]
        similarities = [function(x, y) for x, y in pairs]
        return similarities[0] if len(similarities) == 1 else torch.stack(similarities)

    measures = {measure: partial(values, function) for measure, function in functions.items()}
    if name in PACKAGES and not find_spec(PACKAGES[name]):
        fields["reason"] = "not installed"
    return Provider(name, measures, flops=operations, products_in=products_in, **fields)


def _cast(dtype: torch.dtype) -> dict[str, Pair]:
    """Naive code on features that were cast first, as autocast, or its absence, does."""

    def cast(function: Pair, x: Tensor, y: Tensor) -> Tensor:
        return function(x.to(dtype), y.to(dtype))

    return {measure: partial(cast, baselines.NAIVE[measure]) for measure in CKA_MEASURES}


@contextmanager
def _tf32() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _compiled(name: str) -> Provider:
    mode = "max-autotune" if name == AUTOTUNED else "default"
    compiled = partial(torch.compile, dynamic=False, mode=mode)
    return _pairwise(name, {m: compiled(f) for m, f in baselines.NAIVE.items()}, flops.naive)


def _ours(backend: str) -> Provider:
    def values(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        students, teachers = inputs.students, inputs.teachers
        features = (students, teachers) if len(students) > 1 else (students[0], teachers[0])
        return function(*features, mask=inputs.mask, backend=backend)

    return Provider(
        OURS + backend,
        {measure: partial(values, function) for measure, function in _OURS.items()},
        availability.reason_against(backend),
        flops.rift_kernels,
        torch.float32 if backend == "eager" else None,
        _suits_cuda if backend == "cuda" else lambda _: True,
    )


def _suits_cuda(workload: Workload) -> bool:
    """Whether the CUDA kernels are made for it: few rows, or on Hopper many in bfloat16."""
    if workload.measure not in CKA_MEASURES:
        return False
    if plan.use_gram("cka", workload.rows, workload.width, workload.width):
        return workload.rows <= plan.SMALL_ROWS
    return workload.dtype == torch.bfloat16 and workload.valid == 1


def _ckatorch(x: Tensor, y: Tensor) -> Tensor:
    from ckatorch.core import cka_base

    # The package's other method, "fro_norm", detaches the features: no gradient.
    return cka_base(x, y, kernel="linear", method="hsic")


def _pytorch_cka(x: Tensor, y: Tensor) -> Tensor:
    from cka import cka_from_features

    # The package returns the matrix of all pairs of layers.
    return cka_from_features(x, y)[0, 0]
