"""Who computes a measure: naive code, public packages, and every backend of rift_kernels.

A provider that cannot run here stays in the list and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import rift_kernels
from rift_kernels import dispatch

from . import baselines, flops
from .workloads import CKA_MEASURES, Workload

Pair = Callable[[Tensor, Tensor], Tensor]
Values = Callable[[list[Tensor], list[Tensor]], Tensor]

NAIVE = "naive eager"
COMPILED = "torch.compile"
HAND_DERIVED = "hand-derived"
PACKAGES = ("ckatorch", "pytorch-cka")
OURS = "rift_kernels "


@dataclass(frozen=True)
class Provider:
    """An implementation of some measures.

    Args:
        name: a column of the tables.
        measures: measure -> function of the lists of students and teachers.
        reason: why it cannot run here, or None.
        flops: the model of its cost, None where there is none.
        products_in: the dtype that it multiplies in, None for that of the features.
        takes: whether it has anything for a workload of these measures.
    """

    name: str
    measures: Mapping[str, Values] = field(default_factory=dict)
    reason: str | None = None
    flops: Callable[[Workload], float | None] = lambda _: None
    products_in: torch.dtype | None = None
    takes: Callable[[Workload], bool] = lambda _: True


def providers(device: torch.device, compiled: bool = True) -> list[Provider]:
    """All of them, in the order of their turn when time is short.

    Args:
        device: where the features are.
        compiled: include torch.compile, which needs seconds for every shape.
    """
    return [
        Provider(NAIVE, _each_layer(baselines.NAIVE), flops=flops.naive),
        *(_ours(backend) for backend in dispatch.BACKENDS),
        Provider(
            HAND_DERIVED,
            _each_layer({"cka_biased": baselines.hand_derived_cka}),
            flops=flops.hand_derived,
            products_in=None if device.type == "cuda" else torch.float32,
        ),
        _ckatorch(),
        _pytorch_cka(),
        _compiled() if compiled else Provider(COMPILED, reason="not part of this profile"),
    ]


def _each_layer(functions: Mapping[str, Pair]) -> dict[str, Values]:
    """One call a layer, as a user of a function of two features has to."""

    def values(function: Pair, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        if len(students) == 1:
            return function(students[0], teachers[0])
        return torch.stack([function(x, y) for x, y in zip(students, teachers, strict=True)])

    return {measure: partial(values, function) for measure, function in functions.items()}


def _compiled() -> Provider:
    functions = {
        measure: torch.compile(function, dynamic=False)
        for measure, function in baselines.NAIVE.items()
    }
    return Provider(COMPILED, _each_layer(functions), flops=flops.naive)


def _ours(backend: str) -> Provider:
    functions: dict[str, Callable[..., Tensor]] = {
        "cka_biased": partial(rift_kernels.linear_cka, debiased=False),
        "cka_debiased": rift_kernels.linear_cka,
        "procrustes": rift_kernels.procrustes_similarity,
        "covariance": rift_kernels.covariance_distance,
        "bures": rift_kernels.bures_distance,
    }

    def values(
        function: Callable[..., Tensor], students: list[Tensor], teachers: list[Tensor]
    ) -> Tensor:
        if len(students) == 1:
            return function(students[0], teachers[0], backend=backend)
        return function(students, teachers, backend=backend)

    return Provider(
        OURS + backend,
        {measure: partial(values, function) for measure, function in functions.items()},
        dispatch.reason_against(backend),
        flops.rift_kernels,
        torch.float32 if backend == "eager" else None,
        _suits_cuda if backend == "cuda" else lambda _: True,
    )


def _suits_cuda(workload: Workload) -> bool:
    """What the CUDA kernels are for: few rows, or on Hopper many in bfloat16."""
    if workload.measure not in CKA_MEASURES:
        return False
    if dispatch.use_gram("cka", workload.rows, workload.width, workload.width):
        return workload.rows <= 128
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    return is_hopper and workload.dtype == torch.bfloat16


def _ckatorch() -> Provider:
    try:
        from ckatorch.core import cka_base
    except ImportError as error:
        return Provider("ckatorch", reason=f"cannot be imported: {error}")
    # Its other method, "fro_norm", detaches the features: no gradient.
    function = partial(cka_base, kernel="linear", method="hsic")
    return Provider(
        "ckatorch",
        _each_layer({"cka_biased": function}),
        flops=flops.ckatorch,
        products_in=torch.float64,
    )


def _pytorch_cka() -> Provider:
    try:
        from cka import cka_from_features
    except ImportError as error:
        return Provider("pytorch-cka", reason=f"cannot be imported: {error}")
    return Provider(
        "pytorch-cka",
        # It returns the matrix of all pairs of layers.
        _each_layer({"cka_debiased": lambda x, y: cka_from_features(x, y)[0, 0]}),
        flops=flops.pytorch_cka,
    )
