"""The registered operators and their autograd: the only boundary that torch.compile sees.

Per measure one forward operator ``<measure>_fwd`` (features -> values, and what the backward
needs); one backward operator ``features_bwd`` for all of them. Each takes lists, one entry a layer,
so that a backend may serve all layers in one launch. ``moments_fwd`` and ``matmul`` serve single
features. Autograd stays outside the operators: a registered formula costs more per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import features, measures
from .backends import eager
from .distributed import Ranks
from .precision import full_precision

NAMESPACE = "rift_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LAYERS = "Tensor[] students, Tensor[] teachers, Tensor[] masks, bool[] gram"
_HOW = "bool student_grad, bool teacher_grad, str precision, str backend"
_HOW_MANY = 8  # arguments, of both together
_SETTINGS = {
    "cka": {"debiased": "bool", "distance": "bool"},
    "procrustes": {"method": "str", "distance": "bool"},
    "covariance": {"scale": "str", "mean_weight": "float"},
    "bures": {"squared": "bool", "mean_weight": "float", "method": "str"},
}
_TENSORS_A_LAYER = 2 + len(measures.Coefficients._fields)


def _backend(name: str) -> ModuleType:
    """The module that implements the primitives; dispatch has already refused what cannot run."""
    if name == "triton":
        # Not before it is asked for: triton is optional, and slow to import.
        from .backends import triton

        return triton
    if name == "cuda":
        from .backends import cuda

        return cuda
    return eager


def _primitives(backend: str, rows: Tensor) -> ModuleType:
    """The backend's for a layer; of a rank without a row, torch's, which know how to do nothing."""
    return _backend(backend) if rows.shape[-2] else eager


def _is_fused(measure: str, backend: str, gram: Sequence[bool]) -> bool:
    """Whether the backend goes from features to values by itself, without a head in measures.py.

    Nothing is where moments are summed over ranks, which is the measure "" in the backward.
    """
    return backend != "eager" and (measure == "cka" or (measure == "covariance" and not any(gram)))


def _inputs(
    call: Call, sides: tuple[bool, bool], students: list[Tensor], teachers: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The features that the backward of fused measures reads; of few rows in CUDA, none."""
    few_rows = call.backend == "cuda" and all(call.gram)
    if call.ranks or few_rows or not _is_fused(call.measure, call.backend, call.gram):
        return [], []
    measure, gram = call.measure, call.gram
    both = measure == "cka" and not all(gram)
    # One side alone would be taken for what was computed in its dtype.
    both = both or students[0].dtype != teachers[0].dtype
    if both and any(sides):
        return students, teachers
    return (students if sides[0] else []), (teachers if sides[1] else [])


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32."""
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def _register(schema: str, implementation: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    # The implementations are shape-agnostic PyTorch, so they are their own fakes.
    torch.library.register_fake(f"{NAMESPACE}::{name}", implementation, lib=_LIBRARY)


def _center(
    student: Tensor, teacher: Tensor, mask: Tensor | None, ranks: Ranks | None = None
) -> measures.Centered:
    dtype = _compute_dtype(student, teacher)
    if ranks is not None:
        centered = features.center_over_ranks(student, teacher, mask, dtype, ranks.total)
        return measures.Centered(*centered, mask, ranks)
    x, mean_x, count = features.center(student, mask, dtype)
    y, mean_y, _ = features.center(teacher, mask, dtype)
    return measures.Centered(x, y, mean_x, mean_y, count, mask)


def _tensors(optional: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    """An operator returns tensors only: None becomes an empty one, the rest contiguous."""
    return [like.new_empty(0) if t is None else t.contiguous() for t in optional]


def _mask_of_each(masks: Sequence[Tensor], layers: int) -> Sequence[Tensor | None]:
    """No mask, one mask for all layers, or one each."""
    if len(masks) == layers:
        return masks
    return [masks[0] if masks else None] * layers


def _measure_fwd(
    head: Callable[..., measures.Head],
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    ranks: Ranks | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Values, and per layer the centered features and the coefficients (empty where absent)."""
    want = measures.Wanted(student_grad, teacher_grad)
    values, saved = [], []
    with full_precision(students[0].device, precision):
        for x, y, mask, use_gram in zip(
            students, teachers, _mask_of_each(masks, len(students)), gram, strict=True
        ):
            f = _center(x, y, mask, ranks)
            value, coefficients = head(f, _primitives(backend, x), use_gram, want)
            values.append(value.to(f.x.dtype))
            if any(want):
                crossed = coefficients.xy is not None
                own_x = f.x if crossed or want.student else None
                own_y = f.y if crossed or want.teacher else None
                saved += _tensors((own_x, own_y, *coefficients), f.x)
    return values[0] if len(values) == 1 else torch.stack(values), saved


def _head(measure: str, settings: Sequence[Any]) -> Callable[..., measures.Head]:
    named = dict(zip(_SETTINGS[measure], settings, strict=True))
    return partial(getattr(measures, measure), **named)


def _fwd(measure: str, *call: Any) -> tuple[Tensor, list[Tensor]]:
    """Layers and how, then the measure's settings."""
    how, settings = call[:_HOW_MANY], call[_HOW_MANY:]
    if _is_fused(measure, how[-1], how[3]):
        *layers, backend = how
        return getattr(_backend(backend), f"{measure}_fwd")(*layers, *settings)
    return _measure_fwd(_head(measure, settings), *how)


def _features_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    measure: str,
) -> list[Tensor]:
    """The wanted gradients, all students first.

    Fused measures take the features themselves, of the others what the forward saved is enough.
    """
    if _is_fused(measure, backend, gram):
        features_ = (students, teachers, saved, masks, gram)
        sides = (student_grad, teacher_grad)
        dtypes = (student_dtype, teacher_dtype)
        return _backend(backend).fused_bwd(grad_values, *features_, sides, dtypes, measure == "cka")
    layers = len(gram)
    grad_students, grad_teachers = [], []
    with full_precision(grad_values.device, precision):
        for i, mask in enumerate(_mask_of_each(masks, layers)):
            scale = grad_values if layers == 1 else grad_values[i]
            x, y, *rest = saved[i * _TENSORS_A_LAYER : (i + 1) * _TENSORS_A_LAYER]
            c = measures.Coefficients(*(t if t.dim() > 1 or t.numel() else None for t in rest))
            cross = None if c.xy is None else c.xy.mT
            primitives = _primitives(backend, x if x.dim() > 1 else y)
            if student_grad:
                side = (scale, x, y, mask, c.xx, c.xy, c.wx, c.bx)
                grad_students.append(
                    features.features_bwd(primitives, *side, gram[i], student_dtype)
                )
            if teacher_grad:
                side = (scale, y, x, mask, c.yy, cross, c.wy, c.by)
                grad_teachers.append(
                    features.features_bwd(primitives, *side, gram[i], teacher_dtype)
                )
    return grad_students + grad_teachers


def _moments_fwd(
    student: Tensor,
    teacher: Tensor,
    masks: list[Tensor],
    wanted: str,
    precision: str,
    backend: str,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Centered features, count, means, and the wanted blocks (empty where not wanted)."""
    with full_precision(student.device, precision):
        f = _center(student, teacher, masks[0] if masks else None, ranks)
        blocks = f.ranks.blocks(*_primitives(backend, student).moments(f.x, f.y, False, wanted))()
    return [f.x, f.y, f.mean_x, f.mean_y, f.count, *_tensors(blocks, f.x)]


def _matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    with full_precision(a.device, precision):
        return a @ b


for _measure_name, _settings in _SETTINGS.items():
    _arguments = ", ".join(f"{kind} {name}" for name, kind in _settings.items())
    _register(
        f"{_measure_name}_fwd({_LAYERS}, {_HOW}, {_arguments}) -> (Tensor, Tensor[])",
        partial(_fwd, _measure_name),
    )
_register(
    "features_bwd(Tensor grad_values, Tensor[] students, Tensor[] teachers, Tensor[] saved,"
    f" Tensor[] masks, bool[] gram, {_HOW}, ScalarType student_dtype, ScalarType teacher_dtype,"
    " str measure) -> Tensor[]",
    _features_bwd,
)
_register(
    "moments_fwd(Tensor student, Tensor teacher, Tensor[] masks, str wanted, str precision,"
    " str backend) -> Tensor[]",
    _moments_fwd,
)
_register("matmul(Tensor a, Tensor b, str precision) -> Tensor", _matmul)


class Call(NamedTuple):
    """What a measure needs beside its tensors."""

    measure: str
    settings: tuple[Any, ...]
    gram: tuple[bool, ...]
    precision: str
    backend: str
    ranks: Ranks | None = None  # with whom moments are summed


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "rift_kernels gradients cannot be differentiated again, so backward does not take "
            "create_graph=True; rift_kernels.reference has native autograd throughout"
        )


def _savable(tensor: Tensor) -> Tensor:
    """A tensor made in inference mode cannot be saved for the backward; its copy can."""
    if (
        torch.compiler.is_compiling()
        or not tensor.is_inference()
        or torch.is_inference_mode_enabled()
    ):
        return tensor
    return tensor.clone()


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, sides: tuple[bool, bool], *tensors: Tensor) -> Tensor:
        layers = len(call.gram)
        students, teachers = list(tensors[:layers]), list(tensors[layers : 2 * layers])
        masks = list(tensors[2 * layers :])
        values, saved = _forward(call, sides, students, teachers, masks)
        own, other = _inputs(call, sides, students, teachers)
        ctx.save_for_backward(*map(_savable, (*masks, *own, *other)), *saved)
        ctx.call, ctx.sides, ctx.kept = call, sides, (len(masks), len(own), len(other))
        ctx.dtypes = students[0].dtype, teachers[0].dtype
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        call, (student_grad, teacher_grad) = ctx.call, ctx.sides
        layers = len(call.gram)
        if call.ranks is not None:
            # Data-parallel training divides by this when it averages gradients.
            grad_values = grad_values * call.ranks.size
        # Read once: activation checkpointing recomputes at the first look and forbids a second.
        tensors = list(ctx.saved_tensors)
        masks, own, other = ctx.kept
        grads = torch.ops.rift_kernels.features_bwd(
            grad_values,
            tensors[masks : masks + own],
            tensors[masks + own : masks + own + other],
            tensors[masks + own + other :],
            tensors[:masks],
            call.gram,
            student_grad,
            teacher_grad,
            call.precision,
            call.backend,
            *ctx.dtypes,
            "" if call.ranks else call.measure,
        )
        missing = [None] * layers
        grad_students = grads[:layers] if student_grad else missing
        grad_teachers = grads[-layers:] if teacher_grad else missing
        return (None, None, *grad_students, *grad_teachers, *([None] * masks))


def _forward(
    call: Call,
    sides: tuple[bool, bool],
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    gram = list(call.gram)
    how = (students, teachers, masks, gram, *sides, call.precision, call.backend)
    if call.ranks is not None:
        # Not through an operator, which takes no process group.
        forward = partial(_measure_fwd, _head(call.measure, call.settings), ranks=call.ranks)
        return forward(*how)
    return getattr(torch.ops.rift_kernels, f"{call.measure}_fwd")(*how, *call.settings)


def measure(
    call: Call, students: list[Tensor], teachers: list[Tensor], masks: list[Tensor]
) -> Tensor:
    """The values of a measure, differentiable once with respect to students and teachers."""
    wanted = torch.is_grad_enabled()
    sides = (
        wanted and any(t.requires_grad for t in students),
        wanted and any(t.requires_grad for t in teachers),
    )
    tensors = [*students, *teachers, *masks]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places, such as a teacher that serves several layers.
        for i, tensor in enumerate(tensors):
            if any(tensor is other for other in tensors[:i]):
                tensors[i] = tensor.view_as(tensor)
    return _Measure.apply(call, sides, *tensors)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        wanted: str,
        precision: str,
        backend: str,
        ranks: Ranks | None,
        x: Tensor,
        y: Tensor,
        *masks: Tensor,
    ) -> tuple[Tensor, ...]:
        how = (x, y, list(masks), wanted, precision, backend)
        if ranks is None:
            centered_x, centered_y, *rest = torch.ops.rift_kernels.moments_fwd(*how)
        else:
            centered_x, centered_y, *rest = _moments_fwd(*how, ranks)
        ctx.ranks = 1 if ranks is None else ranks.size
        mean_x, mean_y, count, *blocks = rest
        ctx.save_for_backward(centered_x, centered_y, count, *map(_savable, masks))
        ctx.how = (*ctx.needs_input_grad[4:6], precision, backend, x.dtype, y.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        return mean_x, mean_y, count, *blocks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        centered_x, centered_y, count, *masks = ctx.saved_tensors
        grad_mean_x, grad_mean_y, _, *blocks = grads
        # torch.compile hands in a zero for a block that was not wanted.
        grad_xx, grad_xy, grad_yy = (None if g is None or g.dim() < 2 else g for g in blocks)
        per_row = (1 / count).to(centered_x.dtype).unsqueeze(-1)
        # <G, Xc^T Xc> has the gradient Xc (G + G^T).
        coefficients = measures.Coefficients(
            xx=None if grad_xx is None else grad_xx + grad_xx.mT,
            xy=grad_xy,
            yy=None if grad_yy is None else grad_yy + grad_yy.mT,
            bx=None if grad_mean_x is None else grad_mean_x * per_row,
            by=None if grad_mean_y is None else grad_mean_y * per_row,
        )
        grads = torch.ops.rift_kernels.features_bwd(
            torch.full_like(count, ctx.ranks),
            [],
            [],
            [centered_x, centered_y, *_tensors(coefficients, centered_x)],
            masks,
            [False],
            *ctx.how,
            "moments",
        )
        student_grad, teacher_grad = ctx.how[:2]
        grad_x = grads[0] if student_grad else None
        grad_y = grads[-1] if teacher_grad else None
        return (None, None, None, None, grad_x, grad_y, *([None] * len(masks)))


def moments(
    student: Tensor,
    teacher: Tensor,
    masks: list[Tensor],
    wanted: str,
    precision: str,
    backend: str,
    ranks: Ranks | None,
) -> tuple[Tensor, ...]:
    """``mean_x, mean_y, count, xx, xy, yy``, differentiable once; blocks not wanted are empty."""
    return _Moments.apply(wanted, precision, backend, ranks, student, teacher, *masks)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, precision: str, dtype: torch.dtype, features: Tensor, rotation: Tensor
    ) -> Tensor:
        wide, matrix = features.to(dtype), rotation.to(dtype)
        ctx.save_for_backward(_savable(features), _savable(rotation))
        ctx.precision = precision
        return torch.ops.rift_kernels.matmul(wide, matrix, precision)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Where this is part of a double backward, the measure has refused already.
        features, rotation = ctx.saved_tensors
        product = partial(torch.ops.rift_kernels.matmul, precision=ctx.precision)
        grad_features = grad_rotation = None
        if ctx.needs_input_grad[2]:
            grad_features = product(grad, rotation.to(grad.dtype).mT).to(features.dtype)
        if ctx.needs_input_grad[3]:
            rows, grad_rows = features.to(grad.dtype).flatten(0, -2), grad.flatten(0, -2)
            grad_rotation = product(rows.mT, grad_rows).to(rotation.dtype)
        return None, None, grad_features, grad_rotation


def rotate(student: Tensor, teacher: Tensor, rotation: Tensor, precision: str) -> Tensor:
    """``teacher @ rotation``, to be compared with this student, differentiable in both factors."""
    dtype = _compute_dtype(student, teacher, rotation)
    return _Rotate.apply(precision, dtype, teacher, rotation)


class _SquaredEnergies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks | None, x: Tensor, *masks: Tensor) -> Tensor:
        f = _center(x, x[..., :1], masks[0] if masks else None, ranks)
        energies = features.row_energy(f.x)
        # Far rows have energies whose products with features leave float32.
        weighted = (energies.unsqueeze(-2) @ f.x.double()).squeeze(-2)
        total, moved = f.ranks.total(energies.square().sum(-1), weighted)()
        ctx.save_for_backward(f.x, energies, moved / f.count.unsqueeze(-1), *map(_savable, masks))
        ctx.size, ctx.dtype = 1 if ranks is None else ranks.size, x.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        x, energies, moved, *masks = ctx.saved_tensors
        factor = (4 * ctx.size * grad).unsqueeze(-1)
        grad_x = (factor * energies).to(x.dtype).unsqueeze(-1) * x
        grad_x -= (factor * moved).to(x.dtype).unsqueeze(-2)
        for mask in masks:
            grad_x.masked_fill_(~mask.unsqueeze(-1), 0.0)
        return None, grad_x.to(ctx.dtype), *([None] * len(masks))


def squared_energies(student: Tensor, masks: list[Tensor], ranks: Ranks | None) -> Tensor:
    """``sum_i ||x_i - mean||^4`` over all ranks (...), float64, differentiable once."""
    return _SquaredEnergies.apply(ranks, student, *masks)
