"""One side's second moments, and the unbiased HSIC of its rows with themselves."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hsic, long_rows
from .coefficients import Coefficients, norm, safe_inverse, times
from .sums_over_ranks import sum_over_ranks


class Moments(NamedTuple):
    """The results, differentiable except for the count."""

    mean: Tensor  # (..., D)
    count: Tensor  # type: ignore[assignment]  # (...), float64
    scatter: Tensor  # (..., D, D): Xc^T Xc
    square: Tensor  # (...), float64: n (n-3) HSIC_1 of X with itself


class Saved(NamedTuple):
    """What the backward needs."""

    rows: Tensor  # (..., N, D), minus the mean of those that are not long
    shift: Tensor  # (..., D), from that mean to the mean of all
    scatter: Tensor  # (..., D, D), without the long rows
    inverse: Tensor  # (...): one over the energy of all rows
    weight: Tensor  # see hsic.Slope
    left: Tensor
    right: Tensor


def forward(
    student: Tensor, mask: Tensor | None, dtype: torch.dtype, primitives: ModuleType, ranks: Any
) -> tuple[Moments, Saved]:
    """The moments of a side whose rows may be spread over ranks."""
    (x,), (mean,), count, long = long_rows.separate([student], mask, dtype, ranks)
    pending = sum_over_ranks(ranks, primitives.moments(x, x, False, "xx")[0])
    inverse = safe_inverse(long.energy)
    products = hsic.row_products([x], long, inverse)
    (scatter,) = pending()
    square = (norm(scatter) * inverse[..., 0]).square()[..., None, None]
    h, _, total = hsic.estimate(products, square, count, ranks)
    ones = torch.ones_like(inverse)
    slope = hsic.slope(products, total, count, ones, 0, x, long, inverse.sqrt(), ranks)
    (rows,) = long.sides
    long.put_(x, rows)
    shift = rows.sum(-2) / count.unsqueeze(-1)
    outer = rows.mT @ rows - count[..., None, None] * shift.unsqueeze(-1) * shift.unsqueeze(-2)
    value = h[..., 0, 0] * long.energy[..., 0].square()
    moments = Moments((mean + shift).to(x.dtype), count, scatter + outer.to(x.dtype), value)
    weight, left, right = slope
    assert weight is not None
    assert left is not None
    assert right is not None
    inverse = inverse[..., 0].clone()
    return moments, Saved(x, shift.to(x.dtype), scatter, inverse, weight, left, right)


def coefficients(
    saved: Saved, count: Tensor, grad_mean: Tensor, grad_scatter: Tensor, grad_square: Tensor
) -> Coefficients:
    """Coefficients of the gradient with respect to the rows."""
    x, inverse = saved.rows, saved.inverse
    # X is both sides of H(X, X), and the slope is half the gradient of one: a factor of 4. It is in
    # units of the energy, and H in units of its square.
    factor = 4 * grad_square * safe_inverse(inverse)
    symmetric = grad_scatter + grad_scatter.mT
    per_row = (1 / count).to(x.dtype).unsqueeze(-1)
    return Coefficients(
        # The bias corrects for the mean that was subtracted, which excludes the long rows.
        xx=symmetric + times(times(saved.scatter, inverse), factor),
        bx=grad_mean * per_row - (saved.shift.unsqueeze(-2) @ symmetric).squeeze(-2),
        wx=(saved.weight * (factor * safe_inverse(inverse)).unsqueeze(-1)).to(x.dtype),
        left_x=saved.left,
        right_x=times(saved.right, factor * safe_inverse(inverse)),
    )
