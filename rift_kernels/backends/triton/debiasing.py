"""What debiasing needs of the rows: their energies, their products with the long ones, and sums
weighted with what these make.

Bytes: the features once for the energies, once more for the sums, and where rows are long once
more for the products, 32 a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import column_mean
from .covariance_cka_head import (
    FIELDS,
    LONG_X,
    LONG_Y,
    PAIRS_XX,
    PAIRS_XY,
    PAIRS_YY,
    PRODUCT_KL,
    SQUARE_K,
    SQUARE_L,
    SUM_K,
    SUM_L,
)
from .covariance_saved import ROW, ROW_OTHER, ROW_OWN, ROWS
from .device import (
    LONG_COUNT,
    LONG_FIELDS,
    LONGEST,
    among,
    kept_rows,
    load_features,
    long_rows,
    valid_rows,
)


@triton.jit
def row_energies(
    x_ptr, stride_n, stride_d, mask_ptr, longest, n, width,
    sums_ptr, segments, stride, count, scale, energy_ptr, begin, end,
    HAS_MASK: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Squared norms of the centered rows ``begin..end``, 0 of rows that are kept apart; returns
    their sum and sum of squares."""
    total = tl.zeros([BLOCK_R], tl.float64)
    square = tl.zeros([BLOCK_R], tl.float64)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = kept_rows(mask_ptr, longest, row, n, HAS_MASK, APART) & (row < end)
        energy = tl.zeros([BLOCK_R], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mean = column_mean(sums_ptr, column, segments, stride, count, column < width, BLOCK)
            mask = valid[:, None] & (column < width)[None, :]
            offsets = row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, (x - mean[None, :]) * scale, 0.0)
            energy += tl.sum(x * x, 1)
        tl.store(energy_ptr + row, energy, mask=row < end)
        wide = energy.to(tl.float64)
        total += wide
        square += wide * wide
    return tl.sum(total, 0), tl.sum(square, 0)


@triton.jit
def _long_products(
    x_ptr, stride_n, stride_d, mask_ptr, longest_ptr, long_count, n, width,
    sums_ptr, segments, stride, count, scale, out_ptr, begin, end,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Products of the centered rows ``begin..end`` with the long ones."""
    slots = tl.arange(0, LONGEST)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = valid_rows(mask_ptr, row, n, HAS_MASK) & (row < end)
        products = tl.zeros([BLOCK_R, LONGEST], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            mean = column_mean(sums_ptr, column, segments, stride, count, inside, BLOCK)
            mask = valid[:, None] & inside[None, :]
            columns = column.to(tl.int64) * stride_d
            offsets = row.to(tl.int64)[:, None] * stride_n + columns[None, :]
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, (x - mean[None, :]) * scale, 0.0)
            for slot in range(long_count):
                other = tl.load(longest_ptr + slot).to(tl.int64) * stride_n
                p = tl.load(x_ptr + other + columns, mask=inside, other=0.0).to(tl.float32)
                p = tl.where(inside, (p - mean) * scale, 0.0)
                product = tl.sum(x * p[None, :], 1)
                products += tl.where(slots[None, :] == slot, product[:, None], 0.0)
        out = out_ptr + row.to(tl.int64)[:, None] * LONGEST + slots[None, :]
        tl.store(out, products, mask=(row < end)[:, None] & (slots < long_count)[None, :])


@triton.jit
def weighted_sums(
    x_ptr, stride_n, stride_d, mask_ptr, longest, n, width, sums_ptr, segments, stride, count,
    own_ptr, other_ptr, out_ptr, half, begin, end,
    HAS_MASK: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Column sums of the centered rows ``begin..end``, weighted with a number of either side's."""
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mean = column_mean(sums_ptr, column, segments, stride, count, column < width, BLOCK)
        by_own = tl.zeros([BLOCK], tl.float32)
        by_other = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            valid = kept_rows(mask_ptr, longest, row, n, HAS_MASK, APART) & (row < end)
            mask = valid[:, None] & (column < width)[None, :]
            offsets = row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - mean[None, :], 0.0)
            own = tl.load(own_ptr + row, mask=valid, other=0.0)
            other = tl.load(other_ptr + row, mask=valid, other=0.0)
            by_own += tl.sum(own[:, None] * x, 0)
            by_other += tl.sum(other[:, None] * x, 0)
        tl.store(out_ptr + column, by_own)
        tl.store(out_ptr + half + column, by_other)


@triton.jit
def _sums_of_k(
    k_ptr, l_ptr, with_x, with_y, longest_ptr, long_count, begin, end, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Makes of energies, in place, less the sums of the rows of K and L without the diagonal: the
    energy less the products with the long rows. Returns what the head needs of these rows."""
    field, slots = tl.arange(0, FIELDS), tl.arange(0, LONGEST)
    long = tl.load(longest_ptr + slots)
    sums = tl.zeros([FIELDS], tl.float64)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = row < end
        r = tl.load(k_ptr + row, mask=inside, other=0.0).to(tl.float64)
        q = tl.load(l_ptr + row, mask=inside, other=0.0).to(tl.float64)
        at = row.to(tl.int64)[:, None] * LONGEST + slots[None, :]
        known = inside[:, None] & (slots < long_count)[None, :]
        x = tl.load(with_x + at, mask=known, other=0.0).to(tl.float64)
        y = tl.load(with_y + at, mask=known, other=0.0).to(tl.float64)
        with_itself = row[:, None] == long[None, :]
        own_x, own_y = tl.where(with_itself, x, 0.0), tl.where(with_itself, y, 0.0)
        x, y = x - own_x, y - own_y
        less_k, less_l = r - tl.sum(x, 1), q - tl.sum(y, 1)
        tl.store(k_ptr + row, less_k.to(tl.float32), mask=inside)
        tl.store(l_ptr + row, less_l.to(tl.float32), mask=inside)
        xx, yy, xy = tl.sum(x * x, 1), tl.sum(y * y, 1), tl.sum(x * y, 1)
        sums += tl.where(field == SUM_K, -tl.sum(less_k, 0), 0.0)
        sums += tl.where(field == SUM_L, -tl.sum(less_l, 0), 0.0)
        sums += tl.where(field == SQUARE_K, tl.sum(less_k * less_k, 0), 0.0)
        sums += tl.where(field == SQUARE_L, tl.sum(less_l * less_l, 0), 0.0)
        sums += tl.where(field == PRODUCT_KL, tl.sum(less_k * less_l, 0), 0.0)
        # Once from either end, where both are long. A long row has no energy here.
        ends = 2 - tl.max(with_itself.to(tl.float64), 1)
        sums += tl.where(field == PAIRS_XX, tl.sum(ends * xx - r * r, 0), 0.0)
        sums += tl.where(field == PAIRS_YY, tl.sum(ends * yy - q * q, 0), 0.0)
        sums += tl.where(field == PAIRS_XY, tl.sum(ends * xy - r * q, 0), 0.0)
        sums += tl.where(field == LONG_X, tl.sum(tl.sum(own_x, 1), 0), 0.0)
        sums += tl.where(field == LONG_Y, tl.sum(tl.sum(own_y, 1), 0), 0.0)
    return sums


@triton.jit
def sums_of_rows(
    x_ptr, y_ptr, stride_xn, stride_xd, stride_yn, stride_yd, mask_ptr, n, d1, d2,
    longest_ptr, longest, long_count, sums_x, sums_y, segments, width, n_float,
    inverse_x, inverse_y, k_ptr, l_ptr, with_x, with_y, begin, end,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What the head needs of the rows ``begin..end``. Leaves sums of rows of K and L, and products
    with the long rows."""
    row_energies(
        x_ptr, stride_xn, stride_xd, mask_ptr, longest, n, d1,
        sums_x, segments, width, n_float, inverse_x, k_ptr, begin, end,
        HAS_MASK, True, BLOCK, BLOCK_R,
    )  # fmt: skip
    row_energies(
        y_ptr, stride_yn, stride_yd, mask_ptr, longest, n, d2,
        sums_y, segments, width, n_float, inverse_y, l_ptr, begin, end,
        HAS_MASK, True, BLOCK, BLOCK_R,
    )  # fmt: skip
    if long_count > 0:
        _long_products(
            x_ptr, stride_xn, stride_xd, mask_ptr, longest_ptr, long_count, n, d1,
            sums_x, segments, width, n_float, inverse_x, with_x, begin, end,
            HAS_MASK, BLOCK, BLOCK_R,
        )  # fmt: skip
        _long_products(
            y_ptr, stride_yn, stride_yd, mask_ptr, longest_ptr, long_count, n, d2,
            sums_y, segments, width, n_float, inverse_y, with_y, begin, end,
            HAS_MASK, BLOCK, BLOCK_R,
        )  # fmt: skip
    # What this program has just stored, it reads again with other threads.
    tl.debug_barrier()
    return _sums_of_k(k_ptr, l_ptr, with_x, with_y, longest_ptr, long_count, begin, end, BLOCK_R)


@triton.jit
def add_row_gradients(
    acc, row, valid, column, width, x_ptr, stride_n, stride_d, mean_ptr, inverse,
    scalars_ptr, row_sums_ptr, products_ptr, weighted_ptr, longest_ptr,
    entry, stride, max_rows, row_programs, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient, to which what rows weigh beside the products is added."""
    side = row_programs * stride
    own_sums = row_sums_ptr + (entry * 2 + SIDE).to(tl.int64) * max_rows
    other_sums = row_sums_ptr + (entry * 2 + 1 - SIDE).to(tl.int64) * max_rows
    own_with = products_ptr + (entry * 2 + SIDE).to(tl.int64) * max_rows * LONGEST
    other_with = products_ptr + (entry * 2 + 1 - SIDE).to(tl.int64) * max_rows * LONGEST
    longest_ptr += entry * LONG_FIELDS
    sum_ptr = weighted_ptr + entry.to(tl.int64) * 4 * side + SIDE * 2 * side + column
    by_own, by_other = tl.load(scalars_ptr + ROW_OWN), tl.load(scalars_ptr + ROW_OTHER)
    constant, count = tl.load(scalars_ptr + ROW), tl.load(scalars_ptr + ROWS)
    of_row = by_own * tl.load(own_sums + row, mask=valid, other=0.0)
    of_row += by_other * tl.load(other_sums + row, mask=valid, other=0.0)
    weight = of_row + constant
    mean = tl.load(mean_ptr + column)
    inside = column < width
    # Of long rows, if any, their columns of U-centered K and L, see longest.py.
    left = (count - 2) / count
    for slot in range(tl.load(longest_ptr + LONG_COUNT)):
        long = tl.load(longest_ptr + slot)
        at = row.to(tl.int64) * LONGEST + slot
        product = by_own * tl.load(own_with + at, mask=valid, other=0.0)
        product += by_other * tl.load(other_with + at, mask=valid, other=0.0)
        weight += left * product
        of_long = by_own * tl.load(own_sums + long) + by_other * tl.load(other_sums + long)
        share = -left * product - (of_row + of_long) / count - constant
        share = tl.where(row == long, 0.0, share) * inverse
        place = long.to(tl.int64) * stride_n + column.to(tl.int64) * stride_d
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean
        acc += share[:, None] * (x * inverse)[None, :]
    weight = tl.where(among(row, long_rows(longest_ptr)), 0.0, weight)
    weight *= inverse
    total = tl.zeros([BLOCK], tl.float32)
    for run in range(row_programs):
        total += by_own * tl.load(sum_ptr + run * stride, mask=inside, other=0.0)
        total += by_other * tl.load(sum_ptr + side + run * stride, mask=inside, other=0.0)
    x = load_features(x_ptr, stride_n, stride_d, row, valid, column, width)
    shift = total * inverse / count
    x = weight[:, None] * (x.to(tl.float32) - mean[None, :]) - shift[None, :]
    return acc + x * inverse
