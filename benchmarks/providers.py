"""Who computes a measure: naive code, public packages, and every backend of rift_kernels.

A provider that cannot run here stays in the list and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rift_kernels
from rift_kernels.dispatch import availability, plan

from . import baselines, flops
from .workloads import AUTOTUNED, CKA_MEASURES, COMPILED, Inputs, Workload, dtype_name

Pair = Callable[[Tensor, Tensor], Tensor]
Values = Callable[[Inputs], Tensor]

NAIVE = "naive eager"
WIDE, TF32, HALF = f"{NAIVE} float32", f"{NAIVE} TF32", f"{NAIVE} bfloat16"
HAND_DERIVED = "hand-derived"
PACKAGES = ("ckatorch", "pytorch-cka")
OURS = "rift_kernels "


@dataclass(frozen=True)
class Provider:
    """An implementation of some measures.

    Args:
        name: a column of the tables.
        measures: measure -> function of the inputs.
        reason: why it cannot run here, or None.
        flops: the model of its cost, None where there is none.
        products_in: the dtype that it multiplies in, None for the features' dtype.
        takes: whether it has anything for a workload of these measures.
        settings: what holds while it runs, forward and backward.
    """

    name: str
    measures: Mapping[str, Values] = field(default_factory=dict)
    reason: str | None = None
    flops: Callable[[Workload], float | None] = lambda _: None
    products_in: torch.dtype | None = None
    takes: Callable[[Workload], bool] = lambda _: True
    settings: Callable[[], AbstractContextManager[None]] = nullcontext

    def can_do(self, workload: Workload) -> bool:
        return self.reason is None and workload.measure in self.measures and self.takes(workload)

    def predicted(self, workload: Workload, peaks: Mapping[str, float]) -> float | None:
        """Seconds of its products, at the peak of the dtype that it multiplies in."""
        count, dtype = self.flops(workload), self.products_in or workload.dtype
        return None if count is None else count / peaks[dtype_name(dtype)]


def providers(device: torch.device, compiled: Sequence[str] = (COMPILED,)) -> list[Provider]:
    """All providers, in the order of their turn when time is short.

    Args:
        device: where the features are.
        compiled: which of torch.compile's modes to include; each needs seconds for every shape.
    """
    on_gpu = device.type == "cuda"
    naive = _each_layer(baselines.NAIVE)
    hand_derived = _each_layer({"cka_biased": baselines.hand_derived_cka})
    products_in = None if on_gpu else torch.float32
    return [
        Provider(NAIVE, naive, flops=flops.naive),
        *(_ours(backend) for backend in availability.BACKENDS),
        Provider(HAND_DERIVED, hand_derived, flops=flops.hand_derived, products_in=products_in),
        _naive_in(WIDE, torch.float32, takes=lambda w: w.dtype.itemsize == 2),
        _naive_in(HALF, torch.bfloat16, takes=lambda w: w.dtype == torch.float32),
        _naive_in(
            TF32, torch.float32, reason=None if on_gpu else "TF32 needs a GPU", settings=_tf32
        ),
        _ckatorch(),
        _pytorch_cka(),
        *(_compiled(mode, mode in compiled) for mode in (COMPILED, AUTOTUNED)),
    ]


def _each_layer(functions: Mapping[str, Pair]) -> dict[str, Values]:
    """One call a layer on the valid rows, as a user of a function of two features has to."""

    def values(function: Pair, inputs: Inputs) -> Tensor:
        pairs = list(zip(inputs.students, inputs.teachers, strict=True))
        if inputs.mask is not None:
            pairs = [(x[inputs.mask], y[inputs.mask]) for x, y in pairs]
        similarities = [function(x, y) for x, y in pairs]
        return similarities[0] if len(similarities) == 1 else torch.stack(similarities)

    return {measure: partial(values, function) for measure, function in functions.items()}


def _naive_in(name: str, dtype: torch.dtype, **fields: Any) -> Provider:
    """Naive code on features that were cast first, as autocast, or its absence, does."""

    def cast(function: Pair, x: Tensor, y: Tensor) -> Tensor:
        return function(x.to(dtype), y.to(dtype))

    functions = {measure: partial(cast, baselines.NAIVE[measure]) for measure in CKA_MEASURES}
    return Provider(name, _each_layer(functions), flops=flops.naive, products_in=dtype, **fields)


@contextmanager
def _tf32() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    # The value may be inherited; written back as it is, it would stay for good.
    matmul.fp32_precision = "none"
    inherited = matmul.fp32_precision == before
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = "none" if inherited else before


def _compiled(name: str, wanted: bool) -> Provider:
    if not wanted:
        return Provider(name, reason="not part of this profile")
    mode = "max-autotune" if name == AUTOTUNED else "default"
    functions = {
        measure: torch.compile(function, dynamic=False, mode=mode)
        for measure, function in baselines.NAIVE.items()
    }
    return Provider(name, _each_layer(functions), flops=flops.naive)


def _ours(backend: str) -> Provider:
    functions: dict[str, Callable[..., Tensor]] = {
        "cka_biased": partial(rift_kernels.linear_cka, debiased=False),
        "cka_debiased": rift_kernels.linear_cka,
        "procrustes": rift_kernels.procrustes_similarity,
        "covariance": rift_kernels.covariance_distance,
        "bures": rift_kernels.bures_distance,
    }

    def values(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        students, teachers = inputs.students, inputs.teachers
        if len(students) == 1:
            return function(students[0], teachers[0], mask=inputs.mask, backend=backend)
        return function(students, teachers, mask=inputs.mask, backend=backend)

    return Provider(
        OURS + backend,
        {measure: partial(values, function) for measure, function in functions.items()},
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
        return workload.rows <= 128
    return workload.dtype == torch.bfloat16 and workload.valid == 1


def _ckatorch() -> Provider:
    try:
        from ckatorch.core import cka_base
    except ImportError as error:
        return Provider("ckatorch", reason=f"cannot be imported: {error}")
    # The package's other method, "fro_norm", detaches the features: no gradient.
    values = _each_layer({"cka_biased": partial(cka_base, kernel="linear", method="hsic")})
    return Provider("ckatorch", values, flops=flops.ckatorch, products_in=torch.float64)


def _pytorch_cka() -> Provider:
    try:
        from cka import cka_from_features
    except ImportError as error:
        return Provider("pytorch-cka", reason=f"cannot be imported: {error}")
    # The package returns the matrix of all pairs of layers.
    values = _each_layer({"cka_debiased": lambda x, y: cka_from_features(x, y)[0, 0]})
    return Provider("pytorch-cka", values, flops=flops.pytorch_cka)
