"""Autograd around the operators: each function here is differentiable once."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rift_kernels.measures import heads

from . import operators, plan
from .ranks import Ranks


class Call(NamedTuple):
    """What a measure needs beside its tensors."""

    measure: str
    settings: tuple[Any, ...]
    gram: tuple[bool, ...]
    precision: str
    backend: str
    ranks: Ranks | None = None  # with whom moments are summed
    asked: str = "eager"  # for which backend, "auto" for whichever runs

    @property
    def fused(self) -> bool:
        """Whether the backend has kernels for all of it; never where ranks sum moments."""
        return self.ranks is None and operators.is_fused(self.measure, self.backend, self.gram)


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
        how = (tensors[masks : masks + own], tensors[masks + own : masks + own + other])
        kept = tensors[masks + own + other :], tensors[:masks]
        grads = _gradients(call, ctx.sides, ctx.dtypes, grad_values, *how, *kept)
        missing = [None] * layers
        grad_students = grads[:layers] if student_grad else missing
        grad_teachers = grads[-layers:] if teacher_grad else missing
        return (None, None, *grad_students, *grad_teachers, *([None] * masks))


def _gradients(
    call: Call,
    sides: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
) -> list[Tensor]:
    """The wanted ones; of the eager backend where a GPU refuses a launch that ``auto`` chose.

    That needs all features of fused measures, which may not be there any more.
    """
    measure = call.measure if call.fused else ""
    operator = torch.ops.rift_kernels.features_bwd

    def by(backend: str, *features_and_saved: list[Tensor]) -> list[Tensor]:
        how = (masks, call.gram, *sides, call.precision, backend, *dtypes, measure)
        return operator(grad_values, *features_and_saved, *how)

    if call.asked != "auto" or torch.compiler.is_compiling():
        return by(call.backend, students, teachers, saved)
    try:
        return by(call.backend, students, teachers, saved)
    except Exception as error:
        rows = max((t.shape[-2] for t in students or teachers), default=0)
        kind_of_sums = "moments" if call.ranks else call.measure
        problem = plan.Problem(kind_of_sums, call.gram, rows, 0)
        kind = plan.kind_of(call.backend, grad_values.device, dtypes, problem)
        lost = call.fused and not (students and teachers)
        if not plan.gives_way(error, call.asked, kind) or lost:
            raise
    if call.fused:
        _, saved = _forward(call._replace(backend="eager"), sides, students, teachers, masks)
    return by("eager", [], [], saved)


def _inputs(
    call: Call, sides: tuple[bool, bool], students: list[Tensor], teachers: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The features that the backward of fused measures reads; of few rows in CUDA, none."""
    few_rows = call.backend == "cuda" and all(call.gram)
    if few_rows or not call.fused:
        return [], []
    measure, gram = call.measure, call.gram
    both = measure == "cka" and not all(gram)
    # One side alone would be taken for what was computed in its dtype.
    both = both or students[0].dtype != teachers[0].dtype
    if both and any(sides):
        return students, teachers
    return (students if sides[0] else []), (teachers if sides[1] else [])


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
        forward = partial(
            operators.measure_fwd, operators.head(call.measure, call.settings), ranks=call.ranks
        )
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
        asked: str,
        x: Tensor,
        y: Tensor,
        *masks: Tensor,
    ) -> tuple[Tensor, ...]:
        how = (x, y, list(masks), wanted, precision, backend)
        if ranks is None:
            centered_x, centered_y, *rest = torch.ops.rift_kernels.moments_fwd(*how)
        else:
            centered_x, centered_y, *rest = operators.moments_fwd(*how, ranks)
        ctx.ranks = 1 if ranks is None else ranks.size
        mean_x, mean_y, count, *blocks = rest
        ctx.save_for_backward(centered_x, centered_y, count, *map(_savable, masks))
        ctx.sides, ctx.dtypes = ctx.needs_input_grad[5:7], (x.dtype, y.dtype)
        ctx.call = Call("moments", (), (False,), precision, backend, None, asked)
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
        coefficients = heads.Coefficients(
            xx=None if grad_xx is None else grad_xx + grad_xx.mT,
            xy=grad_xy,
            yy=None if grad_yy is None else grad_yy + grad_yy.mT,
            bx=None if grad_mean_x is None else grad_mean_x * per_row,
            by=None if grad_mean_y is None else grad_mean_y * per_row,
        )
        saved = [centered_x, centered_y, *operators.tensors_of(coefficients, centered_x)]
        incoming = torch.full_like(count, ctx.ranks)
        found = _gradients(ctx.call, ctx.sides, ctx.dtypes, incoming, [], [], saved, masks)
        student_grad, teacher_grad = ctx.sides
        grad_x = found[0] if student_grad else None
        grad_y = found[-1] if teacher_grad else None
        return (None, None, None, None, None, grad_x, grad_y, *([None] * len(masks)))


def moments(
    student: Tensor,
    teacher: Tensor,
    masks: list[Tensor],
    wanted: str,
    precision: str,
    backend: str,
    ranks: Ranks | None,
    asked: str,
) -> tuple[Tensor, ...]:
    """``mean_x, mean_y, count, xx, xy, yy``, differentiable once; blocks not wanted are empty."""
    return _Moments.apply(wanted, precision, backend, ranks, asked, student, teacher, *masks)


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
    dtype = operators.compute_dtype(student, teacher, rotation)
    return _Rotate.apply(precision, dtype, teacher, rotation)


class _OwnMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, precision: str, backend: str, ranks: Ranks | None, x: Tensor, *masks: Tensor
    ) -> tuple[Tensor, ...]:
        how = (x, list(masks), precision, backend)
        if ranks is None:
            mean, count, *rest = torch.ops.rift_kernels.own_moments_fwd(*how)
        else:
            mean, count, *rest = operators.own_moments_fwd(*how, ranks)
        block, square, *saved = rest
        ctx.save_for_backward(count, *saved, *map(_savable, masks))
        ctx.ranks = 1 if ranks is None else ranks.size
        ctx.how = (True, False, precision, backend, x.dtype, x.dtype)
        ctx.mark_non_differentiable(count)
        return mean, count, block, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        count, x, moved, block, inverse, weight, left, right, *masks = ctx.saved_tensors
        grad_mean, _, grad_block, grad_square = grads
        # H(X, X) has X in four places, and half of one is what the coefficients are of. Theirs are
        # in units of the energy, of which H is the square.
        factor = 4 * grad_square * heads.safe_inverse(inverse)
        own = grad_block + grad_block.mT
        per_row = (1 / count).to(x.dtype).unsqueeze(-1)
        coefficients = heads.Coefficients(
            # In the sum the features of one half are about another mean than those of the other.
            xx=own + heads.times(heads.times(block, inverse), factor),
            bx=grad_mean * per_row - (moved.unsqueeze(-2) @ own).squeeze(-2),
            wx=(weight * (factor * heads.safe_inverse(inverse)).unsqueeze(-1)).to(x.dtype),
            left_x=left,
            right_x=heads.times(right, factor * heads.safe_inverse(inverse)),
        )
        (grad,) = torch.ops.rift_kernels.features_bwd(
            torch.full_like(count, ctx.ranks),
            [],
            [],
            [x, *operators.tensors_of((None, *coefficients), x)],
            masks,
            [False],
            *ctx.how,
            "",
        )
        return None, None, None, grad, *([None] * len(masks))


def own_moments(
    student: Tensor, masks: list[Tensor], ranks: Ranks | None, precision: str, backend: str
) -> tuple[Tensor, ...]:
    """Mean, count, ``Xc^T Xc`` and ``n (n-3)`` HSIC_1 of X with itself, float64.

    All but the count are differentiable once. See :func:`rift_kernels.linear_cka` of HSIC_1.
    """
    return _OwnMoments.apply(precision, backend, ranks, student, *masks)
