"""What debiasing needs from single rows: energies, products with long rows, sums over rows.

Bytes: the features once for energies, and again from a cache for weighted sums and, if rows are
long, for products, which are 32 a row. Column sums once and 24 a column more per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .covariance_cka_head import (
    LONG_X,
    LONG_Y,
    PAIRS_XX,
    PAIRS_XY,
    PAIRS_YY,
    PRODUCT_KL,
    ROW_FIELDS,
    SQUARE_K,
    SQUARE_L,
    SUM_K,
    SUM_L,
)
from .covariance_saved import ROW, ROW_OTHER, ROW_OWN, ROWS
from .device import (
    ARRIVALS,
    LONG_COUNT,
    LONG_FIELDS,
    LONGEST,
    among,
    arrive,
    kept_rows,
    load_features,
    long_rows,
    valid_rows,
)

# Row programs come in groups, whose last one to finish adds up what all of them have left.
GROUP = tl.constexpr(8)
# What a row program leaves, as many numbers as columns each: means of X and Y, then sums of X
# weighted with k and with l, and those of Y.
WORKSPACE = tl.constexpr(6)
# Steps that loops over columns load ahead.
STAGES = tl.constexpr(4)


@triton.jit
def _store_means(sums_ptr, segments, stride, count, out_ptr, WIDE: tl.constexpr):
    """Store the means of all columns of a side. Loads need not wait for one another."""
    DEEP: tl.constexpr = 4
    for first in range(0, stride, WIDE):
        column = first + tl.arange(0, WIDE)
        inside = column < stride
        total = tl.zeros([DEEP, WIDE], tl.float32)
        for start in range(0, segments, DEEP):
            segment = start + tl.arange(0, DEEP)
            total += tl.load(
                sums_ptr + segment[:, None] * stride + column[None, :],
                mask=(segment < segments)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
        tl.store(out_ptr + column, tl.sum(total, 0) / count, mask=inside)


@triton.jit
def row_energies(
    x_ptr, stride_n, stride_d, row, valid, width, mean_ptr, scale,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Squared norms of centered rows, 0 for rows that are not valid.

    Beyond the width, features and means are 0 as well.
    """
    squares = tl.zeros([BLOCK_R, BLOCK], tl.float32)
    for first in tl.range(0, width, BLOCK, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK)
        shift = tl.load(mean_ptr + column) * scale
        x = load_features(x_ptr, stride_n, stride_d, row, valid, column, width)
        x = x.to(tl.float32) * scale - shift[None, :]
        squares += x * x
    return tl.where(valid, tl.sum(squares, 1), 0.0)


@triton.jit
def _long_products(
    x_ptr, stride_n, stride_d, row, valid, longest_ptr, long_count, width, mean_ptr, scale,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Products of centered rows with the long ones, 0 in empty slots."""
    slots = tl.arange(0, LONGEST)
    products = tl.zeros([BLOCK_R, LONGEST], tl.float32)
    for first in range(0, tl.where(long_count > 0, width, 0), BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        mean = tl.load(mean_ptr + column)
        x = load_features(x_ptr, stride_n, stride_d, row, valid, column, width, mean, True) * scale
        for slot in range(long_count):
            offsets = tl.load(longest_ptr + slot).to(tl.int64) * stride_n
            offsets += column.to(tl.int64) * stride_d
            long = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            long = tl.where(inside, (long - mean) * scale, 0.0)
            product = tl.sum(x * long[None, :], 1)
            products += tl.where(slots[None, :] == slot, product[:, None], 0.0)
    return products


@triton.jit
def _store_row_sums(
    x_ptr, stride_n, stride_d, row, inside, valid, kept, longest_ptr, long_count, width,
    mean_ptr, scale, sums_ptr, products_ptr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store negative sums of rows of K without the diagonal, and products with the long rows.

    Rows of centered features sum to 0 over all but the long ones. The negative sum is therefore the
    row's energy less its products with long rows.
    """
    energy = row_energies(
        x_ptr, stride_n, stride_d, row, kept, width, mean_ptr, scale, BLOCK, BLOCK_R
    )
    if long_count > 0:
        products = _long_products(
            x_ptr, stride_n, stride_d, row, valid, longest_ptr, long_count, width, mean_ptr, scale,
            BLOCK, BLOCK_R,
        )  # fmt: skip
        slots = tl.arange(0, LONGEST)
        out = products_ptr + row.to(tl.int64)[:, None] * LONGEST + slots[None, :]
        tl.store(out, products, mask=inside[:, None] & (slots < long_count)[None, :])
        is_diagonal = row[:, None] == tl.load(longest_ptr + slots)[None, :]
        energy -= tl.sum(tl.where(is_diagonal, 0.0, products), 1)
    tl.store(sums_ptr + row, energy, mask=inside)


@triton.jit
def _add_weighted_sums(
    x_ptr, stride_n, stride_d, mask_ptr, longest, n, width, stride, mean_ptr, k_ptr, l_ptr, out_ptr,
    begin, end, is_first, HAS_MASK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add column sums of the centered rows ``begin..end``, weighted with either side's row sums.

    A thread has columns of its own and all of their rows, so that it shares no sums.
    """
    for first in range(0, width, WIDE):
        column = first + tl.arange(0, WIDE)
        inside = column < width
        mean = tl.load(mean_ptr + column, mask=inside, other=0.0)
        before = inside & (is_first == 0)
        sum_k = tl.load(out_ptr + column, mask=before, other=0.0)
        sum_l = tl.load(out_ptr + stride + column, mask=before, other=0.0)
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            valid = kept_rows(mask_ptr, longest, row, n, HAS_MASK, True) & (row < end)
            weight_k = tl.load(k_ptr + row, mask=valid, other=0.0)
            weight_l = tl.load(l_ptr + row, mask=valid, other=0.0)
            x = load_features(x_ptr, stride_n, stride_d, row, valid, column, width)
            x = x.to(tl.float32) - mean[None, :]
            sum_k += tl.sum(weight_k[:, None] * x, 0)
            sum_l += tl.sum(weight_l[:, None] * x, 0)
        tl.store(out_ptr + column, sum_k, mask=column < stride)
        tl.store(out_ptr + stride + column, sum_l, mask=column < stride)


@triton.jit
def _sums_for_head(
    k_ptr, l_ptr, with_x, with_y, longest_ptr, long_count, begin, end, BLOCK_R: tl.constexpr
):  # fmt: skip
    """What the head needs from the rows ``begin..end``, from their negative sums of K and L."""
    field, slots = tl.arange(0, ROW_FIELDS), tl.arange(0, LONGEST)
    long = tl.load(longest_ptr + slots)
    zero = tl.zeros([BLOCK_R], tl.float64)
    sum_k, sum_l, square_k, square_l, product_kl = zero, zero, zero, zero, zero
    pairs_xx, pairs_yy, pairs_xy, long_x, long_y = zero, zero, zero, zero, zero
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = row < end
        minus_k = tl.load(k_ptr + row, mask=inside, other=0.0).to(tl.float64)
        minus_l = tl.load(l_ptr + row, mask=inside, other=0.0).to(tl.float64)
        offsets = row.to(tl.int64)[:, None] * LONGEST + slots[None, :]
        mask = inside[:, None] & (slots < long_count)[None, :]
        x = tl.load(with_x + offsets, mask=mask, other=0.0).to(tl.float64)
        y = tl.load(with_y + offsets, mask=mask, other=0.0).to(tl.float64)
        is_diagonal = row[:, None] == long[None, :]
        own_x, own_y = tl.where(is_diagonal, x, 0.0), tl.where(is_diagonal, y, 0.0)
        x, y = x - own_x, y - own_y
        r, q = minus_k + tl.sum(x, 1), minus_l + tl.sum(y, 1)
        is_long = tl.max(is_diagonal.to(tl.int32), 1) > 0
        # Every pair counts twice, and a pair of long rows is met twice. A long row has no energy.
        r, q = tl.where(is_long, 0.0, r), tl.where(is_long, 0.0, q)
        ends = tl.where(is_long, 1.0, 2.0)
        sum_k -= minus_k
        sum_l -= minus_l
        square_k += minus_k * minus_k
        square_l += minus_l * minus_l
        product_kl += minus_k * minus_l
        pairs_xx += ends * tl.sum(x * x, 1) - r * r
        pairs_yy += ends * tl.sum(y * y, 1) - q * q
        pairs_xy += ends * tl.sum(x * y, 1) - r * q
        long_x += tl.sum(own_x, 1)
        long_y += tl.sum(own_y, 1)
    sums = tl.where(field == SUM_K, tl.sum(sum_k, 0), 0.0)
    sums += tl.where(field == SUM_L, tl.sum(sum_l, 0), 0.0)
    sums += tl.where(field == SQUARE_K, tl.sum(square_k, 0), 0.0)
    sums += tl.where(field == SQUARE_L, tl.sum(square_l, 0), 0.0)
    sums += tl.where(field == PRODUCT_KL, tl.sum(product_kl, 0), 0.0)
    sums += tl.where(field == PAIRS_XX, tl.sum(pairs_xx, 0), 0.0)
    sums += tl.where(field == PAIRS_YY, tl.sum(pairs_yy, 0), 0.0)
    sums += tl.where(field == PAIRS_XY, tl.sum(pairs_xy, 0), 0.0)
    sums += tl.where(field == LONG_X, tl.sum(long_x, 0), 0.0)
    sums += tl.where(field == LONG_Y, tl.sum(long_y, 0), 0.0)
    return sums


@triton.jit
def sums_of_rows(
    x_ptr, y_ptr, stride_xn, stride_xd, stride_yn, stride_yd, mask_ptr, n, d1, d2,
    longest_ptr, long_count, sums_x, sums_y, segments, width, count, inverse_x, inverse_y,
    k_ptr, l_ptr, with_x, with_y, workspace_ptr, weighted_ptr, program, groups, group_size,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    HAS_MASK: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What the head needs from a program's run of rows.

    Stores negative sums of the rows of K and L, products with long rows, and weighted sums, which
    the last program of a group adds up. A block of rows is read twice in succession, the second
    time from a cache.
    """
    # Addresses of single elements fill registers.
    COLUMNS: tl.constexpr = BLOCK if VECTOR > 1 else BLOCK // 2
    # All threads side by side, with 16 bytes each.
    WIDE: tl.constexpr = 8 * COLUMNS
    ROWS: tl.constexpr = BLOCK_R // 8
    longest = long_rows(longest_ptr)
    length = tl.cdiv(tl.cdiv(n, groups * group_size), BLOCK_R) * BLOCK_R
    begin, end = program * length, tl.minimum(n, (program + 1) * length)
    first_ptr = workspace_ptr + program.to(tl.int64) * WORKSPACE * width
    if begin < end:
        for side in range(2):
            own_sums = tl.where(side == 1, sums_y, sums_x)
            _store_means(own_sums, segments, width, count, first_ptr + side * width, WIDE)
    # Other threads of this program read what it has just stored, here and below.
    tl.debug_barrier()
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = row < end
        valid = valid_rows(mask_ptr, row, end, HAS_MASK)
        kept = valid & (among(row, longest) == 0)
        # One copy of the code for both sides, here and below, because registers would run out.
        for side in range(2):
            is_y = side == 1
            _store_row_sums(
                tl.where(is_y, y_ptr, x_ptr), tl.where(is_y, stride_yn, stride_xn),
                tl.where(is_y, stride_yd, stride_xd), row, inside, valid, kept,
                longest_ptr, long_count, tl.where(is_y, d2, d1), first_ptr + side * width,
                tl.where(is_y, inverse_y, inverse_x), tl.where(is_y, l_ptr, k_ptr),
                tl.where(is_y, with_y, with_x), COLUMNS, BLOCK_R,
            )  # fmt: skip
        tl.debug_barrier()
        for side in range(0 if STUDENT else 1, 2 if TEACHER else 1):
            is_y = side == 1
            _add_weighted_sums(
                tl.where(is_y, y_ptr, x_ptr), tl.where(is_y, stride_yn, stride_xn),
                tl.where(is_y, stride_yd, stride_xd), mask_ptr, longest, n,
                tl.where(is_y, d2, d1), width, first_ptr + side * width, k_ptr, l_ptr,
                first_ptr + (2 + 2 * side) * width,
                start, tl.minimum(start + BLOCK_R, end), start == begin, HAS_MASK, WIDE, ROWS,
            )  # fmt: skip
    group = program // group_size
    if arrive(longest_ptr + ARRIVALS + group, group_size):
        tl.debug_barrier()
        first_program = group * group_size
        runs = tl.minimum(group_size, tl.maximum(tl.cdiv(n, length) - first_program, 0))
        first_ptr = workspace_ptr + first_program.to(tl.int64) * WORKSPACE * width
        first_ptr += (WORKSPACE - 4) * width
        weighted_ptr += group * 4 * width
        for first in range(0 if STUDENT else 2 * width, 4 * width if TEACHER else 2 * width, WIDE):
            column = first + tl.arange(0, WIDE)
            mask = column < (4 * width if TEACHER else 2 * width)
            total = tl.zeros([WIDE], tl.float32)
            for run in tl.range(runs, loop_unroll_factor=4):
                total += tl.load(
                    first_ptr + run * (WORKSPACE * width) + column, mask=mask, other=0.0
                )
            tl.store(weighted_ptr + column, total, mask=mask)
    return _sums_for_head(
        k_ptr, l_ptr, with_x, with_y, longest_ptr, long_count, begin, end, BLOCK_R
    )


@triton.jit
def add_row_gradients(
    acc, row, valid, column, width, x_ptr, stride_n, stride_d, mean_ptr, inverse,
    scalars_ptr, row_sums_ptr, products_ptr, weighted_ptr, longest_ptr,
    entry, stride, max_rows, groups, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient, ``acc``, plus ``w Own + V S`` and less the shift of column means."""
    own_sums = row_sums_ptr + (entry * 2 + SIDE).to(tl.int64) * max_rows
    other_sums = row_sums_ptr + (entry * 2 + 1 - SIDE).to(tl.int64) * max_rows
    own_with = products_ptr + (entry * 2 + SIDE).to(tl.int64) * max_rows * LONGEST
    other_with = products_ptr + (entry * 2 + 1 - SIDE).to(tl.int64) * max_rows * LONGEST
    longest_ptr += entry * LONG_FIELDS
    k_ptr = weighted_ptr + entry.to(tl.int64) * groups * 4 * stride + SIDE * 2 * stride + column
    own_ptr, other_ptr = k_ptr + SIDE * stride, k_ptr + (1 - SIDE) * stride
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
    for group in tl.range(groups, loop_unroll_factor=8):
        total += c_own * tl.load(own_ptr + group * 4 * stride, mask=inside, other=0.0)
        total += c_other * tl.load(other_ptr + group * 4 * stride, mask=inside, other=0.0)
    x = load_features(x_ptr, stride_n, stride_d, row, valid, column, width)
    shift = total * inverse / count
    x = weight[:, None] * (x.to(tl.float32) - mean[None, :]) - shift[None, :]
    return acc + x * inverse
