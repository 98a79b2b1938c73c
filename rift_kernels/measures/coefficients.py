"""The form that all gradients have, and the arithmetic of its coefficients.

With ``n`` valid rows and centered ``Xc`` and ``Yc``::

    covariance form   grad_X = Xc xx + Yc xy^T + wx * Xc + bx + left_x right_x
                      grad_Y = Yc yy + Xc xy   + wy * Yc + by + left_y right_y
    Gram form         grad_X = xx Xc + xy   Yc + wx * Xc + bx
                      grad_Y = yy Yc + xy^T Xc + wy * Yc + by

A measure is a function of ``features, primitives, gram, needs_grad, settings`` that returns its
value and coefficients. ``primitives`` is a backend's module, such as ``backends.eager``, which
computes the blocks of second moments that the measure asks for. Values are combined in float64,
from blocks scaled to unit norm if the measure is relative. So only the blocks themselves can
overflow or underflow, and no absolute epsilon is needed.

In covariance form the rows may be spread over ranks, so each sum over rows passes through
``CenteredFeatures.ranks``. In Gram form every rank has all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .centering import CenteredFeatures


class Coefficients(NamedTuple):
    """The gradient's coefficients; None if a term is absent or no gradient needs it."""

    xx: Tensor | None = None
    xy: Tensor | None = None
    yy: Tensor | None = None
    wx: Tensor | None = None  # (..., 1) or (..., N)
    wy: Tensor | None = None
    bx: Tensor | None = None  # (..., D1)
    by: Tensor | None = None  # (..., D2)
    left_x: Tensor | None = None  # (..., N, k): left_x @ right_x is a term of low rank
    right_x: Tensor | None = None  # (..., k, D1)
    left_y: Tensor | None = None
    right_y: Tensor | None = None


class NeedsGrad(NamedTuple):
    """Whether each side needs a gradient."""

    student: bool
    teacher: bool


ValueAndCoefficients = tuple[Tensor, Coefficients]


def safe_inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 at 0, so that no variance contributes nothing. NaN and overflow give NaN."""
    return (x.reciprocal() + (x - x)).masked_fill_(x == 0, 0.0)


def norm(matrix: Tensor) -> Tensor:
    """Frobenius norms, float64."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of matrices, float64."""
    # Rows are summed in their dtype: a cast of the whole product would cost more than its sum.
    return (a * b).sum(-1).double().sum(-1)


def _as_factor(factor: Tensor, block: Tensor) -> Tensor:
    """One number per layer, in the shape and dtype to multiply a block."""
    factor = factor.to(block.dtype)
    # A scalar for a single layer, because torch multiplies by scalars faster.
    return factor[..., None, None] if factor.dim() else factor


def times(block: Tensor, factor: Tensor) -> Tensor:
    """A block times one number per layer, in the block's dtype."""
    return block * _as_factor(factor, block)


def scale_(block: Tensor, *factors: Tensor) -> Tensor:
    """:func:`times` for each factor, in place."""
    for factor in factors:
        block.mul_(_as_factor(factor, block))
    return block


def plus_diagonal_(block: Tensor, number: Tensor | float) -> Tensor:
    """A block plus a multiple of the identity, one for all layers or one per layer, in place."""
    block.diagonal(dim1=-2, dim2=-1).add_(
        number.unsqueeze(-1) if isinstance(number, Tensor) else number
    )
    return block


def nan_below(value: Tensor, count: Tensor, minimum: int) -> Tensor:
    """The value, NaN where too few rows are valid: reading a mask on a GPU would stall."""
    return value.masked_fill(count < minimum, float("nan"))


def similarity(value: Tensor, distance: bool) -> tuple[Tensor, int]:
    """The value, or 1 minus it, still in float64; and the sign of the gradient."""
    return (1 - value, -1) if distance else (value, 1)


def mean_term(
    features: CenteredFeatures, mean_weight: float
) -> tuple[Tensor | float, Tensor | None]:
    """``mean_weight * ||mean_x - mean_y||^2`` and its gradient with respect to each row of X."""
    if mean_weight == 0:
        return 0.0, None
    difference = features.mean_x - features.mean_y
    value = mean_weight * difference.double().square().sum(-1)
    return value, difference * (2 * mean_weight / features.count).to(difference.dtype).unsqueeze(-1)
