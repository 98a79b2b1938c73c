"""The head of linear CKA in Gram form: a layer's value and scalars from its sums, in float64.

    value = <Kx, Ky> / (||Kx|| ||Ky||)

Both K are centered, as gram_cka.py says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gram_saved import store_side

# Fields of the sums that all programs leave to the last one.
SQUARE_X = tl.constexpr(0)
SQUARE_Y = tl.constexpr(1)
PRODUCT = tl.constexpr(2)
# The largest squared norm of a row: a maximum, not a sum.
PEAK_X = tl.constexpr(3)
PEAK_Y = tl.constexpr(4)
FIELDS = tl.constexpr(8)

# A debiased norm below this share of the largest row's energy consists of rounding.
NOISE = tl.constexpr(4 * 2.0**-23)


@triton.jit
def inner_product(a, b):
    """``<a, b>`` of scaled matrices: rows in float32, to save registers, their sum in float64."""
    return tl.sum(tl.sum(a * b, 1).to(tl.float64), 0)


@triton.jit
def _field(sums, field):
    return tl.sum(tl.where(tl.arange(0, FIELDS) == field, sums, 0.0), 0)


@triton.jit
def pack_sums(square_x, square_y, product, peak_x, peak_y):
    """The fields in one vector."""
    field = tl.arange(0, FIELDS)
    sums = tl.where(field == SQUARE_X, square_x, 0.0)
    sums = tl.where(field == SQUARE_Y, square_y, sums)
    sums = tl.where(field == PRODUCT, product, sums)
    sums = tl.where(field == PEAK_X, peak_x.to(tl.float64), sums)
    return tl.where(field == PEAK_Y, peak_y.to(tl.float64), sums)


@triton.jit
def center_offset(row_sum, total, n, DEBIASED: tl.constexpr):
    """``s`` of a row, which is subtracted from its row and its column of K."""
    if DEBIASED:
        s = (row_sum - total / (2 * (n - 1))) / (n - 2)
    else:
        s = (row_sum - total / (2 * n)) / n
    return s


@triton.jit
def gram_cka_head(
    value_ptr, scalars_ptr, sums, n, pivot_x, pivot_y, inverse_x, inverse_y,
    DEBIASED: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """Store a layer's value and scalars; K is that of features scaled by the inverses."""
    xx, yy, xy = _field(sums, SQUARE_X), _field(sums, SQUARE_Y), _field(sums, PRODUCT)
    degenerate = (pivot_x == 0) | (pivot_y == 0)
    fewest = 2
    if DEBIASED:
        fewest = 4
        degenerate = degenerate | (tl.sqrt(xx) <= _field(sums, PEAK_X) * NOISE)
        degenerate = degenerate | (tl.sqrt(yy) <= _field(sums, PEAK_Y) * NOISE)
    beta = tl.where(degenerate, 0.0, 2 / tl.sqrt(tl.where(degenerate, 1.0, xx * yy)))
    value = 0.5 * xy * beta
    # NaN and Inf in features reach the value even where nothing varies.
    value += (pivot_x - pivot_x) + (pivot_y - pivot_y)
    value = tl.where(n < fewest, float("nan"), value)
    beta += value - value
    slope = -2 * value
    if DISTANCE:
        value = 1 - value
        beta, slope = -beta, -slope
    tl.store(value_ptr, value.to(tl.float32))
    alpha_x = tl.where(degenerate, 0.0, slope / tl.where(degenerate, 1.0, xx))
    alpha_y = tl.where(degenerate, 0.0, slope / tl.where(degenerate, 1.0, yy))
    store_side(scalars_ptr, n, alpha_x, beta, inverse_x)
    store_side(scalars_ptr + 4, n, alpha_y, beta, inverse_y)
