"""Features and covariances times a rotation Q, differentiable once in both."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rift_kernels.measures.centering import compute_dtype

from .autograd import savable
from .checks import Layers


def rotated_teachers(layers: Layers, precision: str) -> list[Tensor]:
    """The teachers times their rotations, with masked rows 0."""
    teachers = []
    for i, ((x, y), q) in enumerate(zip(layers.pairs, layers.rotations, strict=True)):
        for mask in layers.mask(i):
            # The rotation's gradient sums over rows, and 0 * NaN is not 0.
            y = y.masked_fill(~mask.unsqueeze(-1), 0.0)
        teachers.append(rotate(x, y, q, precision))
    return teachers


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, precision: str, dtype: torch.dtype, features: Tensor, rotation: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*savable(features, rotation))
        ctx.precision = precision
        return torch.ops.rift_kernels.matmul(features.to(dtype), rotation.to(dtype), precision)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In a double backward the measure refuses before this runs.
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
    dtype = compute_dtype(student, teacher, rotation)
    return _Rotate.apply(precision, dtype, teacher, rotation)
