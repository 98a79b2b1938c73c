"""Autograd around the operators: each function here is differentiable once."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rift_kernels.measures import self_hsic
from rift_kernels.measures.centered import compute_dtype
from rift_kernels.measures.coefficients import Coefficients

from . import operators
from .plan import Plan, gives_way
from .ranks import Ranks

_OPERATORS = torch.ops.rift_kernels
Sides = tuple[bool, bool]  # student, teacher
Dtypes = tuple[torch.dtype, torch.dtype]


class Call(NamedTuple):
    """What a measure needs beside its tensors."""

    measure: str
    settings: tuple[Any, ...]  # in the order of the operator's last arguments
    plan: Plan
    precision: str
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
    def forward(ctx: Any, call: Call, sides: Sides, *tensors: Tensor) -> Tensor:
        layers = len(call.plan.gram)
        students, teachers = list(tensors[:layers]), list(tensors[layers : 2 * layers])
        masks = list(tensors[2 * layers :])
        values, saved = _forward(call, sides, students, teachers, masks)
        keeps = call.plan.keeps
        kept_x = students if sides[0] or (keeps == "both" and any(sides)) else []
        kept_y = teachers if sides[1] or (keeps == "both" and any(sides)) else []
        if keeps == "none":
            kept_x, kept_y = [], []
        ctx.save_for_backward(*map(_savable, (*masks, *kept_x, *kept_y)), *saved)
        ctx.call, ctx.sides = call, sides
        ctx.counts = len(masks), len(kept_x), len(kept_y)
        ctx.dtypes = students[0].dtype, teachers[0].dtype
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        call, sides = ctx.call, ctx.sides
        layers = len(call.plan.gram)
        if call.ranks is not None:
            # Data-parallel training divides by this when it averages gradients.
            grad_values = grad_values * call.ranks.size
        # Read once: activation checkpointing recomputes at the first look and forbids a second.
        tensors = list(ctx.saved_tensors)
        masks, students, teachers, saved = _split(tensors, ctx.counts)
        grads = _gradients(call, sides, ctx.dtypes, grad_values, students, teachers, saved, masks)
        missing = [None] * layers
        grad_students = grads[:layers] if sides[0] else missing
        grad_teachers = grads[-layers:] if sides[1] else missing
        return (None, None, *grad_students, *grad_teachers, *([None] * len(masks)))


def _split(tensors: list[Tensor], counts: tuple[int, ...]) -> list[list[Tensor]]:
    """Consecutive parts of these lengths, and the rest."""
    parts, start = [], 0
    for count in counts:
        parts.append(tensors[start : start + count])
        start += count
    return [*parts, tensors[start:]]


def _forward(
    call: Call, sides: Sides, students: list[Tensor], teachers: list[Tensor], masks: list[Tensor]
) -> operators.Forward:
    """Values, and what the backward needs."""
    plan, measure, settings = call.plan, call.measure, call.settings
    arguments = (students, teachers, masks, list(plan.gram), *sides, call.precision, plan.backend)
    # An operator takes no process group, so ranks call the function behind it.
    source: Any = _OPERATORS if call.ranks is None else operators
    ranks = () if call.ranks is None else (call.ranks,)
    if measure == "cka":
        return source.cka_fwd(*arguments, plan.fused, *settings, *ranks)
    if measure == "procrustes":
        return source.procrustes_fwd(*arguments, *settings, *ranks)
    if measure == "covariance":
        return source.covariance_fwd(*arguments, plan.fused, *settings, *ranks)
    return source.bures_fwd(*arguments, *settings, *ranks)


def _backward(
    call: Call,
    sides: Sides,
    dtypes: Dtypes,
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
) -> list[Tensor]:
    """The wanted gradients, all students first."""
    backend, gram, fused, *_ = call.plan
    if not fused:
        return _OPERATORS.features_bwd(
            grad_values, saved, masks, gram, *sides, call.precision, backend, *dtypes
        )
    operator = _OPERATORS.cka_bwd if call.measure == "cka" else _OPERATORS.covariance_bwd
    return operator(grad_values, students, teachers, saved, masks, gram, *sides, backend, *dtypes)


def _gradients(
    call: Call,
    sides: Sides,
    dtypes: Dtypes,
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
) -> list[Tensor]:
    """The wanted gradients; by the eager backend where a GPU refuses a launch that `auto` chose."""
    features = (students, teachers)
    if call.plan.kind is None:
        return _backward(call, sides, dtypes, grad_values, *features, saved, masks)
    try:
        return _backward(call, sides, dtypes, grad_values, *features, saved, masks)
    except Exception as error:
        # A fused measure is computed anew, for which the features of one side are not enough.
        is_complete = not call.plan.fused or all(features)
        if not gives_way(error, call.plan) or not is_complete:
            raise
    eager = call._replace(plan=call.plan.on_eager())
    if call.plan.fused:
        _, saved = _forward(eager, sides, *features, masks)
    return _backward(eager, sides, dtypes, grad_values, [], [], saved, masks)


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
        plan: Plan,
        ranks: Ranks | None,
        x: Tensor,
        y: Tensor,
        *masks: Tensor,
    ) -> tuple[Tensor, ...]:
        arguments = (x, y, list(masks), wanted, precision, plan.backend)
        if ranks is None:
            centered_x, centered_y, *rest = _OPERATORS.moments_fwd(*arguments)
        else:
            centered_x, centered_y, *rest = operators.moments_fwd(*arguments, ranks)
        mean_x, mean_y, count, *blocks = rest
        ctx.save_for_backward(centered_x, centered_y, count, *map(_savable, masks))
        ctx.sides, ctx.dtypes = ctx.needs_input_grad[4:6], (x.dtype, y.dtype)
        ctx.call = Call("moments", (), plan._replace(gram=(False,)), precision)
        ctx.size = 1 if ranks is None else ranks.size
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
        coefficients = Coefficients(
            xx=None if grad_xx is None else grad_xx + grad_xx.mT,
            xy=grad_xy,
            yy=None if grad_yy is None else grad_yy + grad_yy.mT,
            bx=None if grad_mean_x is None else grad_mean_x * per_row,
            by=None if grad_mean_y is None else grad_mean_y * per_row,
        )
        saved = [centered_x, centered_y, *operators.tensors_of(coefficients, centered_x)]
        incoming = torch.full_like(count, ctx.size)
        sides = ctx.sides
        gradients = _gradients(ctx.call, sides, ctx.dtypes, incoming, [], [], saved, masks)
        grad_x = gradients[0] if sides[0] else None
        grad_y = gradients[-1] if sides[1] else None
        return (None, None, None, None, grad_x, grad_y, *([None] * len(masks)))


def moments(
    student: Tensor,
    teacher: Tensor,
    masks: list[Tensor],
    wanted: str,
    precision: str,
    plan: Plan,
    ranks: Ranks | None,
) -> tuple[Tensor, ...]:
    """``mean_x, mean_y, count, xx, xy, yy``, differentiable once; blocks not wanted are empty."""
    return _Moments.apply(wanted, precision, plan, ranks, student, teacher, *masks)


class _SelfHsic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, precision: str, plan: Plan, ranks: Ranks | None, x: Tensor, *masks: Tensor
    ) -> tuple[Tensor, ...]:
        arguments = (x, list(masks), precision, plan.backend)
        if ranks is None:
            tensors = _OPERATORS.self_hsic_fwd(*arguments)
        else:
            tensors = operators.self_hsic_fwd(*arguments, ranks)
        mean, count, scatter, square, *saved = tensors
        ctx.save_for_backward(count, *saved, *map(_savable, masks))
        ctx.dtypes = x.dtype, x.dtype
        ctx.call = Call("moments", (), plan._replace(gram=(False,)), precision)
        ctx.size = 1 if ranks is None else ranks.size
        ctx.mark_non_differentiable(count)
        return mean, count, scatter, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        count, *rest = ctx.saved_tensors
        saved, masks = self_hsic.Saved(*rest[:7]), rest[7:]
        grad_mean, _, grad_scatter, grad_square = grads
        coefficients = self_hsic.coefficients(saved, count, grad_mean, grad_scatter, grad_square)
        tensors = [saved.rows, *operators.tensors_of((None, *coefficients), saved.rows)]
        incoming = torch.full_like(count, ctx.size)
        (grad,) = _gradients(ctx.call, (True, False), ctx.dtypes, incoming, [], [], tensors, masks)
        return None, None, None, grad, *([None] * len(masks))


def self_hsic_moments(
    student: Tensor, masks: list[Tensor], precision: str, plan: Plan, ranks: Ranks | None
) -> tuple[Tensor, ...]:
    """:class:`~rift_kernels.measures.self_hsic.Moments`, differentiable once but for the count.

    See :func:`rift_kernels.linear_cka` for HSIC_1.
    """
    return _SelfHsic.apply(precision, plan, ranks, student, *masks)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, precision: str, dtype: torch.dtype, features: Tensor, rotation: Tensor
    ) -> Tensor:
        wide, matrix = features.to(dtype), rotation.to(dtype)
        ctx.save_for_backward(_savable(features), _savable(rotation))
        ctx.precision = precision
        return _OPERATORS.matmul(wide, matrix, precision)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Where this is part of a double backward, the measure has refused already.
        features, rotation = ctx.saved_tensors
        product = partial(_OPERATORS.matmul, precision=ctx.precision)
        grad_features = grad_rotation = None
        if ctx.needs_input_grad[2]:
            grad_features = product(grad, rotation.to(grad.dtype).mT).to(features.dtype)
        if ctx.needs_input_grad[3]:
            rows, grad_rows = features.to(grad.dtype).flatten(0, -2), grad.flatten(0, -2)
            grad_rotation = product(rows.mT, grad_rows).to(rotation.dtype)
        return None, None, grad_features, grad_rotation


def rotate(student: Tensor, teacher: Tensor, rotation: Tensor, precision: str) -> Tensor:
    """``teacher @ rotation``, to be compared with this student, differentiable in both factors."""
    dtype = compute_dtype(student, teacher, rotation)
    return _Rotate.apply(precision, dtype, teacher, rotation)
