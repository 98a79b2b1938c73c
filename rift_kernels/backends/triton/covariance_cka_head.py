"""The head of linear CKA in covariance form: a layer's value and scalars from its sums, in float64.

    value = h / sqrt(hxx hyy),    biased: h = ||C||^2, hxx = ||A||^2, hyy = ||B||^2

Debiased, with K = X X^T and L = Y Y^T, k_i and l_i the sums of their rows without the diagonal, S
the long rows, and A, C and B those of all others, R:

    h   = sum + (sum k)(sum l) / ((n - 1)(n - 2)) - 2 / (n - 2) sum_i k_i l_i
    sum = sum_{i != j} K_ij L_ij
        = ||C||^2 - sum_{i in R} K_ii L_ii + sum_{i != j, i or j in S} K_ij L_ij

so that no difference has a term of a long row's with itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .covariance_saved import store_side

# Fields of the sums that the programs leave to the last of them.
SQUARE_A = tl.constexpr(0)
SQUARE_B = tl.constexpr(1)
SQUARE_C = tl.constexpr(2)
SQUARE_FX = tl.constexpr(3)
SQUARE_FY = tl.constexpr(4)
# Of the rows of K and L without the diagonal: their sums, over all rows.
SUM_K = tl.constexpr(5)
SUM_L = tl.constexpr(6)
SQUARE_K = tl.constexpr(7)
SQUARE_L = tl.constexpr(8)
PRODUCT_KL = tl.constexpr(9)
# K_ij L_ij over all pairs i, j of which a row is long, less that of all other rows with themselves.
PAIRS_XX = tl.constexpr(10)
PAIRS_YY = tl.constexpr(11)
PAIRS_XY = tl.constexpr(12)
# Energies of the long rows.
LONG_X = tl.constexpr(13)
LONG_Y = tl.constexpr(14)
FIELDS = tl.constexpr(16)

# What is left of a unit block by less than this is made of rounding: of float32 sums, or of
# features split in two, where the more columns there are, the more of it averages out.
ROUNDING = tl.constexpr(2.0**-19)
ROUNDING_OF_SPLIT = tl.constexpr(2.0**-14)
MEAN_ROUNDING = tl.constexpr(2.0**-42)


@triton.jit
def _field(sums, field):
    return tl.sum(tl.where(tl.arange(0, FIELDS) == field, sums, 0.0), 0)


@triton.jit
def _hsic(sums, square, pairs, first, second, product, n):
    """n (n - 3) H of one pair of sides, debiased."""
    h = square + _field(sums, pairs)
    h += _field(sums, first) * _field(sums, second) / ((n - 1) * (n - 2))
    return h - 2 / (n - 2) * _field(sums, product)


@triton.jit
def cka_head(
    value_ptr, scalars_ptr, sums, n, long_count, pivot_x, pivot_y, mean_x, mean_y,
    inverse_x, inverse_y, t_x, t_y, rounding,
    DEBIASED: tl.constexpr, DISTANCE: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """The scalars of one layer, in float64."""
    square_a, square_b = _field(sums, SQUARE_A), _field(sums, SQUARE_B)
    square_c = _field(sums, SQUARE_C)
    hxx, hyy, h = square_a, square_b, square_c
    # Of pairs of long rows something is left where all others are alike.
    dead = ((pivot_x == 0) | (pivot_y == 0)) & (long_count < 2)
    fewest = 2
    a, b = n * 0, n * 0
    sum_k, sum_l = _field(sums, SUM_K), _field(sums, SUM_L)
    if DEBIASED:
        fewest = 4
        a, b = n / (n - 2), 1 / ((n - 1) * (n - 2))
        # What does not vary has no moments but what rounding leaves.
        square_a = tl.where(pivot_x == 0, 0.0, square_a)
        square_b = tl.where(pivot_y == 0, 0.0, square_b)
        square_c = tl.where((pivot_x == 0) | (pivot_y == 0), 0.0, square_c)
        hxx = _hsic(sums, square_a, PAIRS_XX, SUM_K, SUM_K, SQUARE_K, n)
        hyy = _hsic(sums, square_b, PAIRS_YY, SUM_L, SUM_L, SQUARE_L, n)
        h = _hsic(sums, square_c, PAIRS_XY, SUM_K, SUM_L, PRODUCT_KL, n)
        # What long rows add is never taken off again. It is made of the mean's rounding where all
        # other rows are alike, and all but one of these.
        of_mean = n * MEAN_ROUNDING
        dead = dead | (hxx <= mean_x * _field(sums, LONG_X) * of_mean)
        dead = dead | (hyy <= mean_y * _field(sums, LONG_Y) * of_mean)
        dead = dead | (hxx <= square_a * rounding) | (hyy <= square_b * rounding)
    beta = tl.where(dead, 0.0, 2 / tl.sqrt(tl.where(dead, 1.0, hxx * hyy)))
    value = 0.5 * h * beta
    # NaN and Inf in the features come through where nothing varies, too.
    value += (pivot_x - pivot_x) + (pivot_y - pivot_y)
    value = tl.where(n < fewest, float("nan"), value)
    beta += value - value
    # Where the terms are not small, their rounded halves are.
    left = (1 - value) * tl.maximum(h, square_c)
    if DISTANCE:
        value = 1 - value
        beta = -beta
    tl.store(value_ptr, value.to(tl.float32))
    u_x = tl.where(dead, 0.0, h / tl.where(dead, 1.0, hxx))
    u_y = tl.where(dead, 0.0, h / tl.where(dead, 1.0, hyy))
    alpha_x, alpha_y = -u_x * beta, -u_y * beta
    full_x = (_field(sums, SQUARE_FX) > left) & HIGH
    full_y = (_field(sums, SQUARE_FY) > left) & HIGH
    # What a row weighs beside the products, from its sums: see covariance_backward.py.
    store_side(
        scalars_ptr, 0, n, beta, -u_x * inverse_x / inverse_y, t_x, full_x,
        -b * (alpha_x * sum_k + beta * sum_l), -a * alpha_x, -a * beta, inverse_x, inverse_y,
    )  # fmt: skip
    store_side(
        scalars_ptr, 1, n, beta, -u_y * inverse_y / inverse_x, t_y, full_y,
        -b * (alpha_y * sum_l + beta * sum_k), -a * alpha_y, -a * beta, inverse_y, inverse_x,
    )  # fmt: skip
