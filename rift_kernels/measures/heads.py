"""Heads: from second moments of centered features to a value and the coefficients of its gradient.

Every gradient has one form (``n`` valid rows, ``Xc`` and ``Yc`` centered):

    covariance form   grad_X = Xc xx + Yc xy^T + wx * Xc + bx + left_x right_x
                      grad_Y = Yc yy + Xc xy   + wy * Yc + by + left_y right_y
    Gram form         grad_X = xx Xc + xy   Yc + wx * Xc + bx
                      grad_Y = yy Yc + xy^T Xc + wy * Yc + by

so a measure is one function here, which asks the backend for the blocks it needs, once per form,
and names the coefficients. Values are combined in float64, where the measure is relative of blocks
scaled to unit norm, so that only the blocks themselves can over- or underflow and no absolute
epsilon is needed.

In covariance form the rows may be spread over ranks: whatever is summed over rows is passed through
``Centered.ranks``. In Gram form every rank has all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hsic, matrix_functions
from .centering import row_energy
from .long_rows import LongRows


class Alone:
    """The rows of one process are all there are; what :class:`.distributed.Ranks` is to several."""

    @staticmethod
    def total(*sums: Tensor | None) -> Callable[[], tuple[Any, ...]]:
        """Begin to sum over ranks, and return what waits for the sums."""
        return lambda: sums

    blocks = total  # of second moments


class Centered(NamedTuple):
    """What is known of one layer before a measure is chosen; leading axes are a batch."""

    x: Tensor  # (..., N, D1), centered, masked rows zero
    y: Tensor  # (..., N, D2)
    mean_x: Tensor  # (..., D1)
    mean_y: Tensor  # (..., D2)
    count: Tensor  # type: ignore[assignment]  # (...), float64: the number of valid rows
    mask: Tensor | None  # (..., N), True = valid
    ranks: Any = Alone  # who has the other rows
    # Where debiasing would cancel: x and y are about the mean of the others, and 0 in these.
    long: LongRows | None = None


class Coefficients(NamedTuple):
    """The gradient's coefficients; None where a term is absent or its gradient is not wanted."""

    xx: Tensor | None = None
    xy: Tensor | None = None
    yy: Tensor | None = None
    wx: Tensor | None = None  # (..., 1) or (..., N)
    wy: Tensor | None = None
    bx: Tensor | None = None  # (..., D1)
    by: Tensor | None = None  # (..., D2)
    left_x: Tensor | None = None  # (..., N, k), and
    right_x: Tensor | None = None  # (..., k, D1), whose product is another term
    left_y: Tensor | None = None
    right_y: Tensor | None = None


class Wanted(NamedTuple):
    """The sides whose gradient is wanted."""

    student: bool
    teacher: bool


Head = tuple[Tensor, Coefficients]

# Of so few, centered rows have inner products of about -D / n, which U-centering takes off, and
# independent ones leave sqrt(D): float32 would lose sqrt(D) / n times its rounding.
_FEW_ROWS = 16


def safe_inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 at 0: what has no variance contributes nothing. NaN and overflow give NaN."""
    return (x.reciprocal() + (x - x)).masked_fill_(x == 0, 0.0)


def norm(matrix: Tensor) -> Tensor:
    """Frobenius norms, float64."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    # Rows in their own dtype: to cast all of it would cost more than to sum it.
    return (a * b).sum(-1).double().sum(-1)


def _for_blocks(factor: Tensor, block: Tensor) -> Tensor:
    """One number per layer in the shape and dtype that multiply a block."""
    factor = factor.to(block.dtype)
    # Of a single layer as a scalar: torch has a faster way for those.
    return factor[..., None, None] if factor.dim() else factor


def times(block: Tensor, factor: Tensor) -> Tensor:
    """A block times one number per layer, in the block's dtype."""
    return block * _for_blocks(factor, block)


def _scale_(block: Tensor, *factors: Tensor) -> Tensor:
    """:func:`times` for each factor, in place."""
    for factor in factors:
        block.mul_(_for_blocks(factor, block))
    return block


def _plus_diagonal_(block: Tensor, number: Tensor | float) -> Tensor:
    """A block plus a multiple of the identity, one for all layers or one per layer, in place."""
    block.diagonal(dim1=-2, dim2=-1).add_(
        number.unsqueeze(-1) if isinstance(number, Tensor) else number
    )
    return block


def _nan_below(value: Tensor, count: Tensor, minimum: int) -> Tensor:
    """NaN where too few rows are valid: a mask on a GPU cannot be checked without waiting."""
    return value.masked_fill(count < minimum, float("nan"))


def _similarity(value: Tensor, distance: bool) -> tuple[Tensor, int]:
    """The value, or 1 less it, still in float64; and the sign of the gradient."""
    return (1 - value, -1) if distance else (value, 1)


def cka(
    f: Centered, backend: ModuleType, gram: bool, want: Wanted, debiased: bool, distance: bool
) -> Head:
    """Linear CKA: ``H(X, Y) / sqrt(H(X, X) H(Y, Y))``; biased, ``H(X, Y) = <Kx, Ky> = ||C||^2``."""
    return (_cka_gram if gram else _cka_covariance)(f, backend, want, debiased, distance)


def _cka_gram(
    f: Centered, backend: ModuleType, want: Wanted, debiased: bool, distance: bool
) -> Head:
    """``<Kx, Ky>`` of Gram matrices of unit norm; debiased, of U-centered ones."""
    x, y = f.x, f.y
    if debiased and x.shape[-2] <= _FEW_ROWS:
        x, y = x.double(), y.double()
    # Stacked, because a small call costs what its operations cost.
    k = torch.stack(backend.moments(x, y, True, "xx yy")[::2], -3)
    inverse = safe_inverse(_u_center_(k, f) if debiased else norm(k))
    xx, yy = _scale_(k, inverse).unbind(-3)
    value = _nan_below(_inner(xx, yy), f.count, 4 if debiased else 2)
    result, sign = _similarity(value, distance)
    slope_x, slope_y = (2 * sign * inverse).unbind(-1)
    return result, Coefficients(
        xx=_scale_(yy - times(xx, value), slope_x).to(f.x.dtype) if want.student else None,
        yy=_scale_(xx - times(yy, value), slope_y).to(f.x.dtype) if want.teacher else None,
    )


def _u_center_(k: Tensor, f: Centered) -> Tensor:
    """U-center Gram matrices (..., 2, N, N) in place, diagonals and row sums becoming 0.

    ``<Kx, Ky> / (n (n-3))`` of such matrices is the unbiased estimator of HSIC (Szekely & Rizzo
    2014). It is summed from what is left, and so does not cancel where one row is far longer than
    all others, as ``||C||^2 - sum_i r_i q_i + ...`` does.

    Returns:
        Their norms (..., 2), 0 where what is left is rounding.
    """
    n = f.count[..., None, None]
    diagonal = k.diagonal(dim1=-2, dim2=-1)
    noise = 4 * torch.finfo(f.x.dtype).eps * diagonal.amax(-1)
    diagonal.zero_()
    rows = k.sum(-1).double()
    shift = (rows - rows.sum(-1, keepdim=True) / (2 * (n - 1))) / (n - 2)
    shift = shift.to(k.dtype)
    k.sub_(shift.unsqueeze(-1)).sub_(shift.unsqueeze(-2))
    k.diagonal(dim1=-2, dim2=-1).zero_()
    if f.mask is not None:
        masked = ~f.mask.unsqueeze(-2)
        k.masked_fill_(masked.unsqueeze(-1), 0.0).masked_fill_(masked.unsqueeze(-2), 0.0)
    size = norm(k)
    # NaN where k had overflowed.
    return size.masked_fill(size <= noise, 0.0) + (noise - noise)


def _cka_covariance(
    f: Centered, backend: ModuleType, want: Wanted, debiased: bool, distance: bool
) -> Head:
    """``||C||^2`` of unit-norm A and B; debiased, the unbiased HSIC of :mod:`.hsic`."""
    pending = f.ranks.blocks(*backend.moments(f.x, f.y, False, "xx xy yy"))
    if debiased:
        return _cka_debiased(f, pending, want, distance)
    xx, xy, yy = pending()
    norms = torch.stack([norm(xx), norm(yy)], -1)
    inverse = safe_inverse(norms)
    cross = (norm(xy) * inverse.sqrt().prod(-1)).square()
    # 1, or 0 where there is no variance, or NaN.
    h = norms * inverse
    value = _nan_below(cross * h.prod(-1), f.count, 2)
    result, sign = _similarity(value, distance)
    alpha, beta = -2 * sign * value.unsqueeze(-1) * h, 2 * sign * h.prod(-1)
    return result, _cka_blocks(xx, xy, yy, inverse, alpha, beta, want)


def _cka_debiased(
    f: Centered, blocks: Callable[[], tuple[Any, ...]], want: Wanted, distance: bool
) -> Head:
    """From second moments without the long rows."""
    long = f.long
    assert long is not None
    sides = [f.x, f.y]
    inverse = safe_inverse(long.energy)
    pairs = hsic.pairs(sides, long, inverse)
    root = inverse.sqrt()
    xx, xy, yy = blocks()
    norms = torch.stack([norm(block) for block in (xx, xy, xy, yy)], -1).unflatten(-1, (2, 2))
    squares = (norms * (root.unsqueeze(-1) * root.unsqueeze(-2))).square()
    h, size, total = hsic.estimate(pairs, squares, f.count, f.ranks)
    own = h.diagonal(dim1=-2, dim2=-1)
    # What is left of the sums by less than this is made of rounding, and counts as nothing.
    inverse_h = own.reciprocal().masked_fill_(own <= 16 * torch.finfo(xx.dtype).eps * size, 0.0)
    inverse_root = inverse_h.prod(-1).sqrt()
    value = _nan_below(h[..., 0, 1] * inverse_root, f.count, 4)
    result, sign = _similarity(value, distance)
    if not any(want):
        return result, Coefficients()
    alpha, beta = -2 * sign * value.unsqueeze(-1) * inverse_h, 2 * sign * inverse_root
    alpha_x, alpha_y = alpha.unbind(-1)
    factors = torch.stack([alpha_x, beta, beta, alpha_y], -1).unflatten(-1, (2, 2))
    slopes = [
        hsic.slope(pairs, total, f.count, factors[..., i, :], i, sides[i], long, root, f.ranks)
        if wanted
        else hsic.NO_SLOPE
        for i, wanted in enumerate(want)
    ]
    # Products with blocks are those of long rows, too.
    for side, rows in zip(sides, long.sides, strict=True):
        long.put_(side, rows)
    student, teacher = slopes
    return result, _cka_blocks(xx, xy, yy, inverse, alpha, beta, want)._replace(
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
    want: Wanted,
) -> Coefficients:
    """Both factors of A, C and B, for those in units of which ``inverse`` (..., 2) is one over."""
    inverse_x, inverse_y = inverse.unbind(-1)
    alpha_x, alpha_y = alpha.unbind(-1)
    cross_scale = inverse.sqrt().prod(-1)
    return Coefficients(
        # Two factors each, because their product may not be a float32.
        xx=_scale_(xx, inverse_x, alpha_x * inverse_x) if want.student else None,
        xy=_scale_(xy, cross_scale, beta * cross_scale),
        yy=_scale_(yy, inverse_y, alpha_y * inverse_y) if want.teacher else None,
    )


def procrustes(
    f: Centered, backend: ModuleType, gram: bool, want: Wanted, method: str, distance: bool
) -> Head:
    """Nuclear norm of the cross-covariance over the norms of the features.

    The nuclear norm is ``<C, polar(C)>``; in Gram form it is the fidelity of Kx and Ky.
    """
    exact = method == "svd"
    energy_x, energy_y = f.ranks.total(row_energy(f.x).sum(-1), row_energy(f.y).sum(-1))()
    inverse_x, inverse_y = safe_inverse(energy_x), safe_inverse(energy_y)
    scale = inverse_x.sqrt() * inverse_y.sqrt()
    if gram:
        forth, back, nuclear = _transport(f, backend, gram, exact)
    else:
        factor, nuclear = _polar(f, backend, gram, exact)
    value = _nan_below(nuclear * scale, f.count, 2)
    result, sign = _similarity(value, distance)
    scale = sign * scale
    own_x, own_y = -sign * value * inverse_x, -sign * value * inverse_y
    if gram:
        # A difference of near-equal terms: one matrix, formed in float64 and kept so.
        return result, Coefficients(
            xx=_plus_diagonal_(_scale_(forth, scale), own_x) if want.student else None,
            yy=_plus_diagonal_(_scale_(back, scale), own_y) if want.teacher else None,
        )
    return result, Coefficients(
        xy=times(factor, scale).to(f.x.dtype),
        wx=own_x.to(f.x.dtype).unsqueeze(-1),
        wy=own_y.to(f.x.dtype).unsqueeze(-1),
    )


def _polar(f: Centered, backend: ModuleType, gram: bool, exact: bool) -> tuple[Tensor, Tensor]:
    """Polar factor and nuclear norm of the cross block."""
    _, xy, _ = f.ranks.blocks(*backend.moments(f.x, f.y, gram, "xy"))()
    if exact:
        return matrix_functions.polar_svd(xy.double())
    return matrix_functions.polar(xy.double(), backend)


def _transport(
    f: Centered, backend: ModuleType, gram: bool, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Transport maps between the own blocks, and their fidelity.

    The blocks are summed in float64: the map inverts one of them, and where that is singular the
    rounding of a float32 sum would be what is inverted.
    """
    xx, _, yy = f.ranks.blocks(*backend.moments(f.x.double(), f.y.double(), gram, "xx yy"))()
    if exact:
        return matrix_functions.transport_eigh(xx, yy)
    return matrix_functions.transport(xx, yy, backend)


def bures(
    f: Centered,
    backend: ModuleType,
    gram: bool,
    want: Wanted,
    squared: bool,
    mean_weight: float,
    method: str,
) -> Head:
    """2-Wasserstein distance of two Gaussians.

    The cross term is the fidelity of the covariances; in Gram form it is the nuclear norm of
    ``Xc Yc^T``, which is bounded where a covariance is singular.
    """
    exact = method == "eigh"
    inverse_n = 1 / (f.count - 1)
    (traces,) = f.ranks.total(row_energy(f.x).sum(-1) + row_energy(f.y).sum(-1))()
    # Both terms in float64: close to the teacher the distance is a small difference of them.
    if gram:
        wide = f._replace(x=f.x.double(), y=f.y.double())
        factor, cross = _polar(wide, backend, gram, exact)
    else:
        forth, back, cross = _transport(f, backend, gram, exact)
    # Rounding may leave a distance of nothing a little below zero; clamp passes NaN on.
    value = ((traces - 2 * cross) * inverse_n).clamp(min=0)
    mean_value, bias = _mean_term(f, mean_weight)
    value = _nan_below(value + mean_value, f.count, 2)
    outer = torch.ones_like(value)
    if not squared:
        value = value.sqrt()
        outer = 0.5 * safe_inverse(value)
    scale = 2 * outer * inverse_n
    dtype = f.x.dtype
    if bias is not None:
        bias = bias * outer.unsqueeze(-1).to(dtype)
    if gram:
        weight = scale.to(dtype).unsqueeze(-1)
        blocks = Coefficients(xy=times(factor, -scale).to(dtype), wx=weight, wy=weight.clone())
    else:
        blocks = Coefficients(
            xx=_scale_(_plus_diagonal_(forth, -1.0), -scale) if want.student else None,
            yy=_scale_(_plus_diagonal_(back, -1.0), -scale) if want.teacher else None,
        )
    return value, blocks._replace(bx=bias, by=None if bias is None else -bias)


def covariance(
    f: Centered, backend: ModuleType, gram: bool, want: Wanted, scale: str, mean_weight: float
) -> Head:
    """``||S_s - S_t||^2``, divided by ``||S_t||^2``, by ``4 D^2``, or by nothing.

    The Gram form works on ``U = Xc - Yc`` and ``V = Xc + Yc``, because then
    ``||S_s - S_t||^2 = (<U U^T, V V^T> + <U V^T, V U^T>) / 2 (n-1)^2`` is small with U, while
    ``||Kx||^2 - 2 ||Xc Yc^T||^2 + ||Ky||^2`` is a difference of large numbers.
    """
    inverse_n = 1 / (f.count - 1)
    if gram:
        uu, uv, vv = backend.moments(f.x - f.y, f.x + f.y, gram, "xx xy yy")
        both = uv + uv.mT
        yy = (uu + vv - both) / 4
        # Tensor cores leave a rest of what cancels: what does not vary is told by itself.
        flat_x, flat_y = ((side == 0).flatten(-2).all(-1) for side in (f.x, f.y))
        norm_y = norm(yy).masked_fill(flat_y, 0.0)
    else:
        xx, _, yy = f.ranks.blocks(*backend.moments(f.x, f.y, gram, "xx yy"))()
        difference = xx - yy
        norm_y = norm(yy)
    if scale == "relative":
        inverse_unit = safe_inverse(norm_y)
    else:
        unit = 2 * f.x.shape[-1] if scale == "coral" else 1
        inverse_unit = inverse_n / unit
    if gram:
        uu, vv, uv = (times(block, inverse_unit) for block in (uu, vv, uv))
        value = (0.5 * (_inner(uu, vv) + _inner(uv, uv.mT))).clamp(min=0)
    else:
        difference = times(difference, inverse_unit)
        value = norm(difference).square()
    mean_value, bias = _mean_term(f, mean_weight)
    # What the teacher's own norm in the denominator adds to its gradient.
    denominator = value if scale == "relative" else torch.zeros_like(value)
    outer = _nan_below(4 * inverse_unit, f.count, 2)
    value = _nan_below(value + mean_value, f.count, 2)
    yy = times(yy, inverse_unit)
    if gram:
        both = uv + uv.mT
        coefficients = Coefficients(
            xx=times((uu + vv + both) / 4, outer) if want.student else None,
            # - Xc Yc^T
            xy=times((uu - vv - uv + uv.mT) / 4, outer).masked_fill(
                (flat_x | flat_y)[..., None, None], 0.0
            ),
            yy=times(yy, outer * (1 - denominator)) if want.teacher else None,
        )
    else:
        coefficients = Coefficients(
            xx=times(difference, outer) if want.student else None,
            yy=-times(difference + times(yy, denominator), outer) if want.teacher else None,
        )
    return value, coefficients._replace(bx=bias, by=None if bias is None else -bias)


def _mean_term(f: Centered, mean_weight: float) -> tuple[Tensor | float, Tensor | None]:
    """``mean_weight * ||mean_x - mean_y||^2`` and its gradient with respect to each row of X."""
    if mean_weight == 0:
        return 0.0, None
    difference = f.mean_x - f.mean_y
    value = mean_weight * difference.double().square().sum(-1)
    return value, difference * (2 * mean_weight / f.count).to(difference.dtype).unsqueeze(-1)
