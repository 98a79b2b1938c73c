"""What debiasing needs from single rows: energies, products with long rows, sums over rows.

Bytes: the features once for energies, once more for weighted sums, and once more for products if
rows are long, which are 32 a row.
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
    """Store squared norms of the centered rows ``begin..end``, 0 for rows kept apart; return their
    sum."""
    total = tl.zeros([BLOCK_R], tl.float64)
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
        total += energy.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _long_products(
    x_ptr, stride_n, stride_d, mask_ptr, longest_ptr, long_count, n, width,
    sums_ptr, segments, stride, count, scale, out_ptr, begin, end,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store products of the centered rows ``begin..end`` with the long ones."""
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
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store column sums of the centered rows ``begin..end``, weighted by either side's row sums."""
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mean = column_mean(sums_ptr, column, segments, stride, count, column < width, BLOCK)
        own_total = tl.zeros([BLOCK], tl.float32)
        other_total = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            valid = kept_rows(mask_ptr, longest, row, n, HAS_MASK, True) & (row < end)
            mask = valid[:, None] & (column < width)[None, :]
            offsets = row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - mean[None, :], 0.0)
            own = tl.load(own_ptr + row, mask=valid, other=0.0)
            other = tl.load(other_ptr + row, mask=valid, other=0.0)
            own_total += tl.sum(own[:, None] * x, 0)
            other_total += tl.sum(other[:, None] * x, 0)
        tl.store(out_ptr + column, own_total)
        tl.store(out_ptr + half + column, other_total)


@triton.jit
def _sums_of_k(
    k_ptr, l_ptr, with_x, with_y, longest_ptr, long_count, begin, end, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Replace energies by negative sums of the rows of K and L without the diagonal, which are the
    energies less products with long rows. Return what the head needs from these rows."""
    field, slots = tl.arange(0, FIELDS), tl.arange(0, LONGEST)
    long = tl.load(longest_ptr + slots)
    sums = tl.zeros([FIELDS], tl.float64)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = row < end
        r = tl.load(k_ptr + row, mask=inside, other=0.0).to(tl.float64)
        q = tl.load(l_ptr + row, mask=inside, other=0.0).to(tl.float64)
        offsets = row.to(tl.int64)[:, None] * LONGEST + slots[None, :]
        mask = inside[:, None] & (slots < long_count)[None, :]
        x = tl.load(with_x + offsets, mask=mask, other=0.0).to(tl.float64)
        y = tl.load(with_y + offsets, mask=mask, other=0.0).to(tl.float64)
        is_diagonal = row[:, None] == long[None, :]
        own_x, own_y = tl.where(is_diagonal, x, 0.0), tl.where(is_diagonal, y, 0.0)
        x, y = x - own_x, y - own_y
        minus_k, minus_l = r - tl.sum(x, 1), q - tl.sum(y, 1)
        tl.store(k_ptr + row, minus_k.to(tl.float32), mask=inside)
        tl.store(l_ptr + row, minus_l.to(tl.float32), mask=inside)
        xx, yy, xy = tl.sum(x * x, 1), tl.sum(y * y, 1), tl.sum(x * y, 1)
        sums += tl.where(field == SUM_K, -tl.sum(minus_k, 0), 0.0)
        sums += tl.where(field == SUM_L, -tl.sum(minus_l, 0), 0.0)
        sums += tl.where(field == SQUARE_K, tl.sum(minus_k * minus_k, 0), 0.0)
        sums += tl.where(field == SQUARE_L, tl.sum(minus_l * minus_l, 0), 0.0)
        sums += tl.where(field == PRODUCT_KL, tl.sum(minus_k * minus_l, 0), 0.0)
        # Every pair counts twice, and a pair of long rows is met twice. A long row's energy is 0.
        ends = 2 - tl.max(is_diagonal.to(tl.float64), 1)
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
    """What the head needs from the rows ``begin..end``. Stores negative sums of the rows of K and
    L, and products with long rows."""
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
    # Other threads of this program read what it has just stored.
    tl.debug_barrier()
    return _sums_of_k(k_ptr, l_ptr, with_x, with_y, longest_ptr, long_count, begin, end, BLOCK_R)


@triton.jit
def add_row_gradients(
    acc, row, valid, column, width, x_ptr, stride_n, stride_d, mean_ptr, inverse,
    scalars_ptr, row_sums_ptr, products_ptr, weighted_ptr, longest_ptr,
    entry, stride, max_rows, row_programs, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient, ``acc``, plus ``w Own + V S`` and less the shift of column means."""
    side = row_programs * stride
    own_sums = row_sums_ptr + (entry * 2 + SIDE).to(tl.int64) * max_rows
    other_sums = row_sums_ptr + (entry * 2 + 1 - SIDE).to(tl.int64) * max_rows
    own_with = products_ptr + (entry * 2 + SIDE).to(tl.int64) * max_rows * LONGEST
    other_with = products_ptr + (entry * 2 + 1 - SIDE).to(tl.int64) * max_rows * LONGEST
    longest_ptr += entry * LONG_FIELDS
    sum_ptr = weighted_ptr + entry.to(tl.int64) * 4 * side + SIDE * 2 * side + column
    c_own, c_other = tl.load(scalars_ptr + ROW_OWN), tl.load(scalars_ptr + ROW_OTHER)
    constant, count = tl.load(scalars_ptr + ROW), tl.load(scalars_ptr + ROWS)
    row_sum = c_own * tl.load(own_sums + row, mask=valid, other=0.0)
    row_sum += c_other * tl.load(other_sums + row, mask=valid, other=0.0)
    weight = row_sum + constant
    mean = tl.load(mean_ptr + column)
    inside = column < width
    # V S: long rows, if any, times their columns of U-centered K and L.
    factor = (count - 2) / count
    for slot in range(tl.load(longest_ptr + LONG_COUNT)):
        long = tl.load(longest_ptr + slot)
        index = row.to(tl.int64) * LONGEST + slot
        product = c_own * tl.load(own_with + index, mask=valid, other=0.0)
        product += c_other * tl.load(other_with + index, mask=valid, other=0.0)
        weight += factor * product
        long_sum = c_own * tl.load(own_sums + long) + c_other * tl.load(other_sums + long)
        v = -factor * product - (row_sum + long_sum) / count - constant
        v = tl.where(row == long, 0.0, v) * inverse
        offsets = long.to(tl.int64) * stride_n + column.to(tl.int64) * stride_d
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - mean
        acc += v[:, None] * (x * inverse)[None, :]
    weight = tl.where(among(row, long_rows(longest_ptr)), 0.0, weight)
    weight *= inverse
    total = tl.zeros([BLOCK], tl.float32)
    for run in range(row_programs):
        total += c_own * tl.load(sum_ptr + run * stride, mask=inside, other=0.0)
        total += c_other * tl.load(sum_ptr + side + run * stride, mask=inside, other=0.0)
    x = load_features(x_ptr, stride_n, stride_d, row, valid, column, width)
    shift = total * inverse / count
    x = weight[:, None] * (x.to(tl.float32) - mean[None, :]) - shift[None, :]
    return acc + x * inverse
