"""The head of linear CKA in covariance form: a layer's value and scalars from its sums, in float64.

    value = h / sqrt(hxx hyy),    biased: h = ||C||^2, hxx = ||A||^2, hyy = ||B||^2

Debiasing uses K = X X^T and L = Y Y^T, with sums k_i and l_i of their rows without the diagonal. S
are the long rows, R all others, and A, C and B are those of R:

    h   = sum + (sum k)(sum l) / ((n - 1)(n - 2)) - 2 / (n - 2) sum_i k_i l_i
    sum = sum_{i != j} K_ij L_ij
        = ||C||^2 - sum_{i in R} K_ii L_ii + sum_{i != j, i or j in S} K_ij L_ij

No difference then has a term of a long row with itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .covariance_saved import store_side

# Fields of the sums that programs of tiles leave to the last one.
SQUARE_A = tl.constexpr(0)
SQUARE_B = tl.constexpr(1)
SQUARE_C = tl.constexpr(2)
SQUARE_FX = tl.constexpr(3)
SQUARE_FY = tl.constexpr(4)
FIELDS = tl.constexpr(8)
# Fields of those that row programs leave. Over all rows: k_i, l_i, their squares, their products.
SUM_K = tl.constexpr(0)
SUM_L = tl.constexpr(1)
SQUARE_K = tl.constexpr(2)
SQUARE_L = tl.constexpr(3)
PRODUCT_KL = tl.constexpr(4)
# Sums of K_ij L_ij over i != j with a long row, less those of K_ii L_ii over R; XX and YY likewise.
PAIRS_XX = tl.constexpr(5)
PAIRS_YY = tl.constexpr(6)
PAIRS_XY = tl.constexpr(7)
# Energies of the long rows.
LONG_X = tl.constexpr(8)
LONG_Y = tl.constexpr(9)
ROW_FIELDS = tl.constexpr(16)

# A debiased norm below this share of a block's consists of rounding: of float32 sums, or of
# features split in two, whose rounding averages out over columns.
ROUNDING = tl.constexpr(2.0**-19)
ROUNDING_OF_SPLIT = tl.constexpr(2.0**-14)
MEAN_ROUNDING = tl.constexpr(2.0**-42)


@triton.jit
def _field(sums, field):
    return tl.sum(tl.where(tl.arange(0, sums.shape[0]) == field, sums, 0.0), 0)


@triton.jit
def _hsic(sums, square, pairs, first, second, product, n):
    """``n (n - 3)`` times the unbiased HSIC of a pair of sides."""
    h = square + _field(sums, pairs)
    h += _field(sums, first) * _field(sums, second) / ((n - 1) * (n - 2))
    return h - 2 / (n - 2) * _field(sums, product)


@triton.jit
def covariance_cka_head(
    value_ptr, scalars_ptr, sums, row_sums, n, long_count, pivot_x, pivot_y, mean_x, mean_y,
    inverse_x, inverse_y, t_x, t_y, rounding,
    DEBIASED: tl.constexpr, DISTANCE: tl.constexpr, LOW_HALVES: tl.constexpr,
):  # fmt: skip
    """Store a layer's value and scalars, computed in float64."""
    square_a, square_b = _field(sums, SQUARE_A), _field(sums, SQUARE_B)
    square_c = _field(sums, SQUARE_C)
    hxx, hyy, h = square_a, square_b, square_c
    # Two long rows still make a pair where all other rows are alike.
    degenerate = ((pivot_x == 0) | (pivot_y == 0)) & (long_count < 2)
    fewest = 2
    a, b = n * 0, n * 0
    sum_k, sum_l = _field(row_sums, SUM_K), _field(row_sums, SUM_L)
    if DEBIASED:
        fewest = 4
        a, b = n / (n - 2), 1 / ((n - 1) * (n - 2))
        # Moments of features that do not vary are rounding.
        square_a = tl.where(pivot_x == 0, 0.0, square_a)
        square_b = tl.where(pivot_y == 0, 0.0, square_b)
        square_c = tl.where((pivot_x == 0) | (pivot_y == 0), 0.0, square_c)
        hxx = _hsic(row_sums, square_a, PAIRS_XX, SUM_K, SUM_K, SQUARE_K, n)
        hyy = _hsic(row_sums, square_b, PAIRS_YY, SUM_L, SUM_L, SQUARE_L, n)
        h = _hsic(row_sums, square_c, PAIRS_XY, SUM_K, SUM_L, PRODUCT_KL, n)
        # What long rows add is never subtracted again. If all other rows are alike, and all but one
        # of the long rows, it consists of the mean's rounding.
        share = n * MEAN_ROUNDING
        degenerate = degenerate | (hxx <= mean_x * _field(row_sums, LONG_X) * share)
        degenerate = degenerate | (hyy <= mean_y * _field(row_sums, LONG_Y) * share)
        degenerate = degenerate | (hxx <= square_a * rounding) | (hyy <= square_b * rounding)
    beta = tl.where(degenerate, 0.0, 2 / tl.sqrt(tl.where(degenerate, 1.0, hxx * hyy)))
    value = 0.5 * h * beta
    # NaN and Inf in features reach the value even where nothing varies.
    value += (pivot_x - pivot_x) + (pivot_y - pivot_y)
    value = tl.where(n < fewest, float("nan"), value)
    beta += value - value
    # Where ||F||^2 exceeds this, bfloat16 operands are not enough.
    bound = (1 - value) * tl.maximum(h, square_c)
    if DISTANCE:
        value = 1 - value
        beta = -beta
    tl.store(value_ptr, value.to(tl.float32))
    u_x = tl.where(degenerate, 0.0, h / tl.where(degenerate, 1.0, hxx))
    u_y = tl.where(degenerate, 0.0, h / tl.where(degenerate, 1.0, hyy))
    alpha_x, alpha_y = -u_x * beta, -u_y * beta
    low_halves_x = (_field(sums, SQUARE_FX) > bound) & LOW_HALVES
    low_halves_y = (_field(sums, SQUARE_FY) > bound) & LOW_HALVES
    # A row's weight outside the products follows from its sums; see covariance_backward.py.
    store_side(
        scalars_ptr, 0, n, beta, -u_x * inverse_x / inverse_y, t_x, low_halves_x,
        -b * (alpha_x * sum_k + beta * sum_l), -a * alpha_x, -a * beta, inverse_x, inverse_y,
    )  # fmt: skip
    store_side(
        scalars_ptr, 1, n, beta, -u_y * inverse_y / inverse_x, t_y, low_halves_y,
        -b * (alpha_y * sum_l + beta * sum_k), -a * alpha_y, -a * beta, inverse_y, inverse_x,
    )  # fmt: skip
