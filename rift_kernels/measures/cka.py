"""Linear CKA, biased and debiased: value and coefficients of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import hsic
from .centering import CenteredFeatures
from .coefficients import (
    Coefficients,
    NeedsGrad,
    ValueAndCoefficients,
    inner,
    nan_below,
    norm,
    safe_inverse,
    scale_,
    similarity,
    times,
)
from .sums_over_ranks import sum_blocks_over_ranks

# Up to so many rows, Gram matrices are float64. Centered rows have inner products of about -D / n,
# which U-centering removes; of independent rows sqrt(D) is left, and float32 would lose sqrt(D) / n
# times its rounding.
FLOAT64_GRAM_ROWS = 16


def cka(
    features: CenteredFeatures,
    primitives: ModuleType,
    gram: bool,
    needs_grad: NeedsGrad,
    debiased: bool,
    distance: bool,
) -> ValueAndCoefficients:
    """Linear CKA: ``H(X, Y) / sqrt(H(X, X) H(Y, Y))``; biased, ``H(X, Y) = <Kx, Ky> = ||C||^2``."""
    return (_cka_gram if gram else _cka_covariance)(
        features, primitives, needs_grad, debiased, distance
    )


def _cka_gram(
    features: CenteredFeatures,
    primitives: ModuleType,
    needs_grad: NeedsGrad,
    debiased: bool,
    distance: bool,
) -> ValueAndCoefficients:
    """``<Kx, Ky>`` of Gram matrices of unit norm; debiased, of U-centered ones."""
    x, y, dtype = features.x, features.y, features.x.dtype
    if debiased and x.shape[-2] <= FLOAT64_GRAM_ROWS:
        x, y = x.double(), y.double()
    # Stacked, because the number of operations decides what a small call costs.
    k = torch.stack(primitives.moments(x, y, True, "xx yy")[::2], -3)
    inverse = safe_inverse(_u_center_(k, features) if debiased else norm(k))
    xx, yy = scale_(k, inverse).unbind(-3)
    value = nan_below(inner(xx, yy), features.count, 4 if debiased else 2)
    result, sign = similarity(value, distance)
    slope_x, slope_y = (2 * sign * inverse).unbind(-1)
    return result, Coefficients(
        xx=scale_(yy - times(xx, value), slope_x).to(dtype) if needs_grad.student else None,
        yy=scale_(xx - times(yy, value), slope_y).to(dtype) if needs_grad.teacher else None,
    )


def _u_center_(k: Tensor, features: CenteredFeatures) -> Tensor:
    """U-center Gram matrices (..., 2, N, N) in place: diagonals and row sums become 0.

    ``<Kx, Ky> / (n (n-3))`` of such matrices is the unbiased estimator of HSIC (Szekely & Rizzo
    2014). Where one row is far longer than all others it does not cancel, as
    ``||C||^2 - sum_i r_i q_i + ...`` does.

    Returns:
        Their norms (..., 2), 0 where only rounding is left.
    """
    n = features.count[..., None, None]
    diagonal = k.diagonal(dim1=-2, dim2=-1)
    noise = 4 * torch.finfo(features.x.dtype).eps * diagonal.amax(-1)
    diagonal.zero_()
    rows = k.sum(-1).double()
    shift = (rows - rows.sum(-1, keepdim=True) / (2 * (n - 1))) / (n - 2)
    shift = shift.to(k.dtype)
    k.sub_(shift.unsqueeze(-1)).sub_(shift.unsqueeze(-2))
    k.diagonal(dim1=-2, dim2=-1).zero_()
    if features.mask is not None:
        masked = ~features.mask.unsqueeze(-2)
        k.masked_fill_(masked.unsqueeze(-1), 0.0).masked_fill_(masked.unsqueeze(-2), 0.0)
    size = norm(k)
    # NaN where k had overflowed.
    return size.masked_fill(size <= noise, 0.0) + (noise - noise)


def _cka_covariance(
    features: CenteredFeatures,
    primitives: ModuleType,
    needs_grad: NeedsGrad,
    debiased: bool,
    distance: bool,
) -> ValueAndCoefficients:
    """``||C||^2`` of unit-norm A and B; debiased, the unbiased HSIC of :mod:`.hsic`."""
    pending = sum_blocks_over_ranks(
        features.ranks, *primitives.moments(features.x, features.y, False, "xx xy yy")
    )
    if debiased:
        return _cka_debiased(features, pending, needs_grad, distance)
    xx, xy, yy = pending()
    norms = torch.stack([norm(xx), norm(yy)], -1)
    inverse = safe_inverse(norms)
    cross = (norm(xy) * inverse.sqrt().prod(-1)).square()
    # 1, or 0 where there is no variance, or NaN.
    h = norms * inverse
    value = nan_below(cross * h.prod(-1), features.count, 2)
    result, sign = similarity(value, distance)
    alpha, beta = -2 * sign * value.unsqueeze(-1) * h, 2 * sign * h.prod(-1)
    return result, _cka_blocks(xx, xy, yy, inverse, alpha, beta, needs_grad)


def _cka_debiased(
    features: CenteredFeatures,
    blocks: Callable[[], tuple[Any, ...]],
    needs_grad: NeedsGrad,
    distance: bool,
) -> ValueAndCoefficients:
    """Debiased CKA from second moments without the long rows."""
    long = features.long
    assert long is not None
    sides = [features.x, features.y]
    inverse = safe_inverse(long.energy)
    products = hsic.row_products(sides, long, inverse)
    root = inverse.sqrt()
    xx, xy, yy = blocks()
    norms = torch.stack([norm(block) for block in (xx, xy, xy, yy)], -1).unflatten(-1, (2, 2))
    squares = (norms * (root.unsqueeze(-1) * root.unsqueeze(-2))).square()
    h, size, total = hsic.estimate(products, squares, features.count, features.ranks)
    h_same = h.diagonal(dim1=-2, dim2=-1)
    # Less than this is rounding, and counts as no variance.
    rounding = 16 * torch.finfo(xx.dtype).eps * size
    inverse_h = h_same.reciprocal().masked_fill_(h_same <= rounding, 0.0)
    inverse_root = inverse_h.prod(-1).sqrt()
    value = nan_below(h[..., 0, 1] * inverse_root, features.count, 4)
    result, sign = similarity(value, distance)
    if not any(needs_grad):
        return result, Coefficients()
    alpha, beta = -2 * sign * value.unsqueeze(-1) * inverse_h, 2 * sign * inverse_root
    alpha_x, alpha_y = alpha.unbind(-1)
    factors = torch.stack([alpha_x, beta, beta, alpha_y], -1).unflatten(-1, (2, 2))
    count, ranks = features.count, features.ranks
    slopes = [
        hsic.slope(products, total, count, factors[..., i, :], i, sides[i], long, root, ranks)
        if needed
        else hsic.NO_SLOPE
        for i, needed in enumerate(needs_grad)
    ]
    # The backward multiplies the blocks by all rows, so the long ones return to their places.
    for side, rows in zip(sides, long.sides, strict=True):
        long.put_(side, rows)
    student, teacher = slopes
    return result, _cka_blocks(xx, xy, yy, inverse, alpha, beta, needs_grad)._replace(
        wx=student.weight,
        wy=teacher.weight,
        left_x=student.left,
        left_y=teacher.left,
        right_x=student.right,
        right_y=teacher.right,
    )


def _cka_blocks(
    xx: Tensor,
    xy: Tensor,
    yy: Tensor,
    inverse: Tensor,
    alpha: Tensor,
    beta: Tensor,
    needs_grad: NeedsGrad,
) -> Coefficients:
    """Coefficients of A, C and B in units of the sides; ``inverse`` (..., 2) is one over those."""
    inverse_x, inverse_y = inverse.unbind(-1)
    alpha_x, alpha_y = alpha.unbind(-1)
    cross_scale = inverse.sqrt().prod(-1)
    return Coefficients(
        # Two factors, because their product may exceed float32.
        xx=scale_(xx, inverse_x, alpha_x * inverse_x) if needs_grad.student else None,
        xy=scale_(xy, cross_scale, beta * cross_scale),
        yy=scale_(yy, inverse_y, alpha_y * inverse_y) if needs_grad.teacher else None,
    )
