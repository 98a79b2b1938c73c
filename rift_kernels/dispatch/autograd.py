"""Autograd around the operators: each function here is differentiable once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rift_kernels.measures import self_hsic
from rift_kernels.measures.coefficients import Coefficients, NeedsGrad

from . import operators
from .plan import Plan, withdraw_if_refused
from .ranks import Ranks

_OPERATORS = torch.ops.rift_kernels
Dtypes = tuple[torch.dtype, torch.dtype]


class Call(NamedTuple):
    """What a measure needs beside its tensors."""

    measure: str
    settings: tuple[Any, ...]  # in the order of the operator's last arguments
    plan: Plan
    precision: str
    ranks: Ranks | None = None  # the processes that sum their moments


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "rift_kernels gradients cannot be differentiated again, so backward does not take "
            "create_graph=True; rift_kernels.reference has native autograd throughout"
        )


def savable(*tensors: Tensor) -> Sequence[Tensor]:
    """A tensor made in inference mode cannot be saved for the backward; its copy can."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensors
    return [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]


def _forward_functions(ranks: Ranks | None) -> tuple[Any, tuple[Ranks, ...]]:
    """Where forward functions are found, and their last arguments.

    An operator takes no process group, so ranks call the functions behind the operators.
    """
    return (_OPERATORS, ()) if ranks is None else (operators, (ranks,))


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, needs_grad: NeedsGrad, *tensors: Tensor) -> Tensor:
        layers = len(call.plan.gram)
        students, teachers = list(tensors[:layers]), list(tensors[layers : 2 * layers])
        masks = list(tensors[2 * layers :])
        values, saved = _forward(call, needs_grad, students, teachers, masks)
        keeps_students, keeps_teachers = call.plan.kept_sides(needs_grad)
        kept_students = students if keeps_students else []
        kept_teachers = teachers if keeps_teachers else []
        ctx.save_for_backward(*savable(*masks, *kept_students, *kept_teachers), *saved)
        ctx.call, ctx.needs_grad = call, needs_grad
        ctx.counts = len(masks), len(kept_students), len(kept_teachers)
        ctx.dtypes = students[0].dtype, teachers[0].dtype
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        call, needs_grad = ctx.call, ctx.needs_grad
        layers = len(call.plan.gram)
        if call.ranks is not None:
            # Data-parallel training divides by the number of ranks when it averages gradients.
            grad_values = grad_values * call.ranks.size
        # Read once: activation checkpointing recomputes on the first read and forbids a second.
        tensors = list(ctx.saved_tensors)
        masks, students, teachers, saved = _split(tensors, ctx.counts)
        grads = _gradients(
            call, needs_grad, ctx.dtypes, grad_values, students, teachers, saved, masks
        )
        missing = [None] * layers
        grad_students = grads[:layers] if needs_grad.student else missing
        grad_teachers = grads[-layers:] if needs_grad.teacher else missing
        return (None, None, *grad_students, *grad_teachers, *([None] * len(masks)))


def _split(tensors: list[Tensor], counts: tuple[int, ...]) -> list[list[Tensor]]:
    """Consecutive parts of these lengths, and the rest."""
    parts, start = [], 0
    for count in counts:
        parts.append(tensors[start : start + count])
        start += count
    return [*parts, tensors[start:]]


def _forward(
    call: Call,
    needs_grad: NeedsGrad,
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
) -> operators.Forward:
    """Values, and what the backward needs."""
    plan, measure, settings = call.plan, call.measure, call.settings
    gram = list(plan.gram)
    arguments = (students, teachers, masks, gram, *needs_grad, call.precision, plan.backend)
    functions, ranks = _forward_functions(call.ranks)
    if measure == "cka":
        return functions.cka_fwd(*arguments, plan.fused, *settings, *ranks)
    if measure == "procrustes":
        return functions.procrustes_fwd(*arguments, *settings, *ranks)
    if measure == "covariance":
        return functions.covariance_fwd(*arguments, plan.fused, *settings, *ranks)
    if measure == "bures":
        return functions.bures_fwd(*arguments, *settings, *ranks)
    raise ValueError(f"there is no measure {measure!r}")


def _backward(
    call: Call,
    needs_grad: NeedsGrad,
    dtypes: Dtypes,
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
) -> list[Tensor]:
    """The gradients that are needed, all students first."""
    backend, gram, fused, *_ = call.plan
    if not fused:
        return _OPERATORS.features_bwd(
            grad_values, saved, masks, gram, *needs_grad, call.precision, backend, *dtypes
        )
    operator = _OPERATORS.cka_bwd if call.measure == "cka" else _OPERATORS.covariance_bwd
    return operator(
        grad_values, students, teachers, saved, masks, gram, *needs_grad, backend, *dtypes
    )


def _gradients(
    call: Call,
    needs_grad: NeedsGrad,
    dtypes: Dtypes,
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
) -> list[Tensor]:
    """The gradients that are needed; eager ones if a GPU refuses a launch that `auto` chose."""
    features = (students, teachers)
    if call.plan.kind is None:
        return _backward(call, needs_grad, dtypes, grad_values, *features, saved, masks)
    try:
        return _backward(call, needs_grad, dtypes, grad_values, *features, saved, masks)
    except Exception as error:
        # A fused measure is computed again, for which the features of one side are not enough.
        is_complete = not call.plan.fused or all(features)
        if not withdraw_if_refused(call.plan, error) or not is_complete:
            raise
    eager = call._replace(plan=call.plan.on_eager())
    if call.plan.fused:
        _, saved = _forward(eager, needs_grad, *features, masks)
    return _backward(eager, needs_grad, dtypes, grad_values, [], [], saved, masks)


def measure(
    call: Call, students: list[Tensor], teachers: list[Tensor], masks: list[Tensor]
) -> Tensor:
    """The values of a measure, differentiable once with respect to students and teachers."""
    grad_enabled = torch.is_grad_enabled()
    needs_grad = NeedsGrad(
        grad_enabled and any(t.requires_grad for t in students),
        grad_enabled and any(t.requires_grad for t in teachers),
    )
    tensors = [*students, *teachers, *masks]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places, such as a teacher that serves several layers.
        for i, tensor in enumerate(tensors):
            if any(tensor is earlier for earlier in tensors[:i]):
                tensors[i] = tensor.view_as(tensor)
    return _Measure.apply(call, needs_grad, *tensors)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block_names: str,
        precision: str,
        plan: Plan,
        ranks: Ranks | None,
        x: Tensor,
        y: Tensor,
        *masks: Tensor,
    ) -> tuple[Tensor, ...]:
        functions, group = _forward_functions(ranks)
        centered_x, centered_y, mean_x, mean_y, count, *blocks = functions.moments_fwd(
            x, y, list(masks), block_names, precision, plan.backend, *group
        )
        ctx.save_for_backward(centered_x, centered_y, count, *savable(*masks))
        ctx.needs_grad, ctx.dtypes = NeedsGrad(*ctx.needs_input_grad[4:6]), (x.dtype, y.dtype)
        ctx.call = Call("moments", (), plan, precision)
        ctx.size = 1 if ranks is None else ranks.size
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(count)
        return mean_x, mean_y, count, *blocks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        centered_x, centered_y, count, *masks = ctx.saved_tensors
        grad_mean_x, grad_mean_y, _, *blocks = grads
        # torch.compile passes a zero for a block that was not computed.
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
        needs_grad = ctx.needs_grad
        gradients = _gradients(ctx.call, needs_grad, ctx.dtypes, incoming, [], [], saved, masks)
        grad_x = gradients[0] if needs_grad.student else None
        grad_y = gradients[-1] if needs_grad.teacher else None
        return (None, None, None, None, grad_x, grad_y, *([None] * len(masks)))


def moments(
    student: Tensor,
    teacher: Tensor,
    masks: list[Tensor],
    block_names: str,
    precision: str,
    plan: Plan,
    ranks: Ranks | None,
) -> tuple[Tensor, ...]:
    """``mean_x, mean_y, count, xx, xy, yy``, differentiable once; other blocks are empty."""
    return _Moments.apply(block_names, precision, plan, ranks, student, teacher, *masks)


class _SelfHsic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, precision: str, plan: Plan, ranks: Ranks | None, x: Tensor, *masks: Tensor
    ) -> tuple[Tensor, ...]:
        functions, group = _forward_functions(ranks)
        mean, count, scatter, square, *saved = functions.self_hsic_fwd(
            x, list(masks), precision, plan.backend, *group
        )
        ctx.save_for_backward(count, *saved, *savable(*masks))
        ctx.dtypes = x.dtype, x.dtype
        ctx.call = Call("moments", (), plan, precision)
        ctx.size = 1 if ranks is None else ranks.size
        ctx.mark_non_differentiable(count)
        return mean, count, scatter, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        count, *rest = ctx.saved_tensors
        fields = len(self_hsic.Saved._fields)
        saved, masks = self_hsic.Saved(*rest[:fields]), rest[fields:]
        grad_mean, _, grad_scatter, grad_square = grads
        coefficients = self_hsic.coefficients(saved, count, grad_mean, grad_scatter, grad_square)
        tensors = [saved.rows, *operators.tensors_of((None, *coefficients), saved.rows)]
        incoming = torch.full_like(count, ctx.size)
        (grad,) = _gradients(
            ctx.call, NeedsGrad(True, False), ctx.dtypes, incoming, [], [], tensors, masks
        )
        return None, None, None, grad, *([None] * len(masks))


def self_hsic_moments(
    student: Tensor, masks: list[Tensor], precision: str, plan: Plan, ranks: Ranks | None
) -> tuple[Tensor, ...]:
    """:class:`~rift_kernels.measures.self_hsic.Moments`, differentiable once except the count.

    :func:`rift_kernels.linear_cka` defines HSIC_1.
    """
    return _SelfHsic.apply(precision, plan, ranks, student, *masks)
