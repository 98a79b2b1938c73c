"""The registered operators: the only boundary that torch.compile sees.

Each measure has a forward operator, from features to values and what the backward needs. A fused
measure (CKA, the covariance distance) has its own backward operator; ``features_bwd`` serves
everything else. Operators take lists, one entry per layer, so that one launch of a backend can
serve all layers. Autograd stays outside, in :mod:`.autograd`: a registered formula costs more.

An operator takes no process group. Where rows are spread over ranks, :mod:`.autograd` calls the
public functions behind the forward operators instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rift_kernels.backends import eager
from rift_kernels.measures import gradient, self_hsic
from rift_kernels.measures.bures import bures
from rift_kernels.measures.centering import CenteredFeatures, center, compute_dtype
from rift_kernels.measures.cka import cka
from rift_kernels.measures.coefficients import Coefficients, NeedsGrad, ValueAndCoefficients
from rift_kernels.measures.covariance import covariance
from rift_kernels.measures.procrustes import procrustes
from rift_kernels.measures.sums_over_ranks import sum_blocks_over_ranks
from rift_kernels.trust import refused_launches

from .precision import full_precision
from .ranks import Ranks

NAMESPACE = "rift_kernels"
try:
    _LIBRARY = torch.library.Library(NAMESPACE, "DEF")
except RuntimeError as error:
    raise ImportError(
        "rift_kernels was loaded in this process before, and torch registers its operators only "
        "once: restart Python to load it again (importlib.reload(rift_kernels) alone works)"
    ) from error
_TENSORS_PER_LAYER = 2 + len(Coefficients._fields)

Forward = tuple[Tensor, list[Tensor]]  # values, and what the backward needs
Measure = Callable[[CenteredFeatures, ModuleType, bool, NeedsGrad], ValueAndCoefficients]


def _module(backend: str) -> ModuleType:
    """The module of a backend that can run here, as the plan has checked."""
    if backend == "triton":
        # Imported late: triton is optional, and slow to import.
        from rift_kernels.backends import triton

        return triton
    if backend == "cuda":
        from rift_kernels.backends import cuda

        return cuda
    return eager


def _primitives(backend: str, rows: Tensor) -> ModuleType:
    """The module that computes a layer: eager for a rank without rows, as it takes empty input."""
    return _module(backend) if rows.shape[-2] else eager


def cka_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    fused: bool,
    debiased: bool,
    distance: bool,
    ranks: Ranks | None = None,
) -> Forward:
    """Linear CKA."""
    layers = (students, teachers, masks, gram)
    if fused:
        settings = (student_grad, teacher_grad, precision, debiased, distance)
        return _module(backend).cka_fwd(*layers, *settings)
    measure = partial(cka, debiased=debiased, distance=distance)
    needs_grad = NeedsGrad(student_grad, teacher_grad)
    return _measure_fwd(measure, *layers, needs_grad, precision, backend, ranks, debiased)


def procrustes_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    method: str,
    distance: bool,
    ranks: Ranks | None = None,
) -> Forward:
    """Procrustes similarity."""
    layers = (students, teachers, masks, gram)
    measure = partial(procrustes, method=method, distance=distance)
    needs_grad = NeedsGrad(student_grad, teacher_grad)
    return _measure_fwd(measure, *layers, needs_grad, precision, backend, ranks)


def covariance_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    fused: bool,
    scale: str,
    mean_weight: float,
    ranks: Ranks | None = None,
) -> Forward:
    """Covariance distance."""
    layers = (students, teachers, masks, gram)
    if fused:
        settings = (student_grad, teacher_grad, precision, scale, mean_weight)
        return _module(backend).covariance_fwd(*layers, *settings)
    measure = partial(covariance, scale=scale, mean_weight=mean_weight)
    needs_grad = NeedsGrad(student_grad, teacher_grad)
    return _measure_fwd(measure, *layers, needs_grad, precision, backend, ranks)


def bures_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    squared: bool,
    mean_weight: float,
    method: str,
    ranks: Ranks | None = None,
) -> Forward:
    """Bures distance."""
    layers = (students, teachers, masks, gram)
    measure = partial(bures, squared=squared, mean_weight=mean_weight, method=method)
    needs_grad = NeedsGrad(student_grad, teacher_grad)
    return _measure_fwd(measure, *layers, needs_grad, precision, backend, ranks)


def _measure_fwd(
    measure: Measure,
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    needs_grad: NeedsGrad,
    precision: str,
    backend: str,
    ranks: Ranks | None,
    exclude_long_rows: bool = False,
) -> Forward:
    """Values, and for each layer its centered features and coefficients, empty where absent."""
    values, saved = [], []
    with full_precision(students[0].device, precision):
        layers = zip(students, teachers, _mask_per_layer(masks, len(gram)), gram, strict=True)
        for x, y, mask, use_gram in layers:
            features = center(x, y, mask, ranks, exclude_long_rows and not use_gram)
            value, coefficients = measure(features, _primitives(backend, x), use_gram, needs_grad)
            values.append(value.to(features.x.dtype))
            if any(needs_grad):
                crossed = coefficients.xy is not None
                saved_x = features.x if crossed or needs_grad.student else None
                saved_y = features.y if crossed or needs_grad.teacher else None
                saved += tensors_of((saved_x, saved_y, *coefficients), features.x)
    return values[0] if len(values) == 1 else torch.stack(values), saved


def tensors_of(optional: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    """The tensors an operator may return: contiguous, and an empty one for each None."""
    return [like.new_empty(0) if t is None else t.contiguous() for t in optional]


def _mask_per_layer(masks: Sequence[Tensor], layers: int) -> Sequence[Tensor | None]:
    if len(masks) == layers:
        return masks
    return [masks[0] if masks else None] * layers


def _features_bwd(
    grad_values: Tensor,
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> list[Tensor]:
    """The gradients that are needed, all students first, from what an unfused forward saved."""
    layers = len(gram)
    grad_students, grad_teachers = [], []
    with full_precision(grad_values.device, precision):
        for i, mask in enumerate(_mask_per_layer(masks, layers)):
            scale = grad_values if layers == 1 else grad_values[i]
            x, y, *rest = saved[i * _TENSORS_PER_LAYER : (i + 1) * _TENSORS_PER_LAYER]
            c = Coefficients(*(t if t.dim() > 1 or t.numel() else None for t in rest))
            cross = None if c.xy is None else c.xy.mT
            primitives = _primitives(backend, x if x.dim() > 1 else y)
            if student_grad:
                terms = (c.xx, c.xy, c.wx, c.bx, c.left_x, c.right_x)
                grad_students.append(
                    gradient.features_bwd(
                        primitives, scale, x, y, mask, *terms, gram[i], student_dtype
                    )
                )
            if teacher_grad:
                terms = (c.yy, cross, c.wy, c.by, c.left_y, c.right_y)
                grad_teachers.append(
                    gradient.features_bwd(
                        primitives, scale, y, x, mask, *terms, gram[i], teacher_dtype
                    )
                )
    return grad_students + grad_teachers


def _cka_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    backend: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> list[Tensor]:
    """The needed gradients of fused CKA, all students first."""
    needs_grad, dtypes = (student_grad, teacher_grad), (student_dtype, teacher_dtype)
    return _module(backend).cka_bwd(
        grad_values, students, teachers, saved, masks, gram, needs_grad, dtypes
    )


def _covariance_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    backend: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> list[Tensor]:
    """The needed gradients of the fused covariance distance, all students first."""
    needs_grad, dtypes = (student_grad, teacher_grad), (student_dtype, teacher_dtype)
    return _module(backend).covariance_bwd(
        grad_values, students, teachers, saved, masks, gram, needs_grad, dtypes
    )


def moments_fwd(
    student: Tensor,
    teacher: Tensor,
    masks: list[Tensor],
    block_names: str,
    precision: str,
    backend: str,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Centered features, means, count, and the blocks with these names; others are empty."""
    with full_precision(student.device, precision):
        x, y, mean_x, mean_y, count, *_ = center(
            student, teacher, masks[0] if masks else None, ranks
        )
        blocks = sum_blocks_over_ranks(
            ranks, *_primitives(backend, student).moments(x, y, False, block_names)
        )()
    return [x, y, mean_x, mean_y, count, *tensors_of(blocks, x)]


def self_hsic_fwd(
    student: Tensor, masks: list[Tensor], precision: str, backend: str, ranks: Ranks | None = None
) -> list[Tensor]:
    """:class:`.self_hsic.Moments` of one side, then :class:`.self_hsic.Saved`."""
    mask = masks[0] if masks else None
    with full_precision(student.device, precision):
        moments, saved = self_hsic.forward(
            student, mask, compute_dtype(student), _primitives(backend, student), ranks
        )
    return [*moments, saved.rows, *tensors_of(saved[1:], saved.rows)]


def _matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    with full_precision(a.device, precision):
        return a @ b


def _register(schema: str, implementation: Callable[..., Any]) -> None:
    def with_advice(*arguments: Any) -> Any:
        try:
            return implementation(*arguments)
        except Exception as error:
            refused_launches.add_advice(error)
            raise

    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, with_advice, "CompositeExplicitAutograd")
    # The implementations run on fake tensors as well, so they are their own fakes.
    torch.library.register_fake(f"{NAMESPACE}::{name}", implementation, lib=_LIBRARY)


_LAYERS = "Tensor[] students, Tensor[] teachers, Tensor[] masks, bool[] gram"
_SIDES = "bool student_grad, bool teacher_grad"
_RUN = f"{_LAYERS}, {_SIDES}, str precision, str backend"
_DTYPES = "ScalarType student_dtype, ScalarType teacher_dtype"
_FUSED_BWD = (
    "Tensor grad_values, Tensor[] students, Tensor[] teachers, Tensor[] saved, Tensor[] masks,"
    f" bool[] gram, {_SIDES}, str backend, {_DTYPES}"
)
_register(
    f"cka_fwd({_RUN}, bool fused, bool debiased, bool distance) -> (Tensor, Tensor[])", cka_fwd
)
_register(
    f"procrustes_fwd({_RUN}, str method, bool distance) -> (Tensor, Tensor[])", procrustes_fwd
)
_register(
    f"covariance_fwd({_RUN}, bool fused, str scale, float mean_weight) -> (Tensor, Tensor[])",
    covariance_fwd,
)
_register(
    f"bures_fwd({_RUN}, bool squared, float mean_weight, str method) -> (Tensor, Tensor[])",
    bures_fwd,
)
_register(f"cka_bwd({_FUSED_BWD}) -> Tensor[]", _cka_bwd)
_register(f"covariance_bwd({_FUSED_BWD}) -> Tensor[]", _covariance_bwd)
_register(
    "features_bwd(Tensor grad_values, Tensor[] saved, Tensor[] masks, bool[] gram,"
    f" {_SIDES}, str precision, str backend, {_DTYPES}) -> Tensor[]",
    _features_bwd,
)
_register(
    "moments_fwd(Tensor student, Tensor teacher, Tensor[] masks, str block_names, str precision,"
    " str backend) -> Tensor[]",
    moments_fwd,
)
_register(
    "self_hsic_fwd(Tensor student, Tensor[] masks, str precision, str backend) -> Tensor[]",
    self_hsic_fwd,
)
_register("matmul(Tensor a, Tensor b, str precision) -> Tensor", _matmul)
