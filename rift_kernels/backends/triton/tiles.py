"""Raw second moments of [X | Y] and its column sums: the one kernel that reads features forward.

    covariance form   Z^T Z of the virtual concatenation Z = [X | Y], contracted over the rows
    Gram form         X X^T and Y Y^T (or X Y^T), contracted over the columns

Only tiles that are wanted and on or above the diagonal exist. Their (tile, chunk) pairs are dealt
out evenly to the tile programs, whatever the number of tiles (stream-K); what they leave is added
by the next launch in a fixed order, so that nothing waits, and results repeat to the last bit.

Half-precision features go into the products as they are, the means come off afterwards; products
of their values are exact in float32. float32 features are centered first and split into two
bfloat16 each: three products.

Bytes: each operand tile once per tile of the result, ``BLOCK_K * BLOCK`` elements at a time;
partial sums ``4 BLOCK^2`` a tile; the column programs read X and Y once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    COUNT,
    ENERGY_X,
    ENERGY_XY,
    ENERGY_Y,
    PIVOT_X,
    PIVOT_Y,
    batch_of,
    column_mean,
    first_valid_row,
    layer_of,
    pick,
    split,
    statistic,
    triangle,
    valid_rows,
)


@triton.jit
def tile_of(slot, blocks_x, blocks_y, XX: tl.constexpr, YY: tl.constexpr):
    """Of the slot-th tile: is its left side Y, its row of tiles, is its right side Y, its column.

    Slots are in the order XX (upper triangle), YY (upper triangle), XY; what is not wanted is not
    there.
    """
    count_x = blocks_x * (blocks_x + 1) // 2 if XX else blocks_x * 0
    count_y = blocks_y * (blocks_y + 1) // 2 if YY else blocks_y * 0
    within_y = slot - count_x
    within_xy = within_y - count_y
    in_x = slot < count_x
    in_y = (within_y >= 0) & (within_xy < 0)
    i, j = triangle(tl.maximum(tl.where(in_x, slot, within_y), 0))
    in_xy = within_xy >= 0
    row = tl.where(in_xy, within_xy // blocks_y, i)
    column = tl.where(in_xy, within_xy % blocks_y, j)
    return in_y, row, in_y | in_xy, column


@triton.jit
def _load(ptr, stride_n, stride_d, rows, valid, columns, width, mean, CENTER: tl.constexpr):
    """A tile (rows, columns) of features, masked rows 0; centered in float32 if asked for."""
    mask = valid[:, None] & (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    if CENTER:
        tile = tl.where(mask, tile.to(tl.float32) - mean[None, :], 0.0)
    return tile


@triton.jit
def _product(a, b, acc, GRAM: tl.constexpr, SPLIT: tl.constexpr):
    """``acc + a^T b``, or ``acc + a b^T`` in Gram form."""
    if SPLIT:
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        if GRAM:
            acc = tl.dot(a_low, tl.trans(b_high), acc)
            acc = tl.dot(a_high, tl.trans(b_low), acc)
            acc = tl.dot(a_high, tl.trans(b_high), acc)
        else:
            acc = tl.dot(tl.trans(a_low), b_high, acc)
            acc = tl.dot(tl.trans(a_high), b_low, acc)
            acc = tl.dot(tl.trans(a_high), b_high, acc)
    elif GRAM:
        acc = tl.dot(a, tl.trans(b), acc)
    else:
        acc = tl.dot(tl.trans(a), b, acc)
    return acc


@triton.jit
def _column_statistics(
    x_ptr, y_ptr, mask_ptr, n, d1, d2, stride_xn, stride_xd, stride_yn, stride_yd,
    sums_ptr, statistics_ptr, program, segments, blocks, width, PROGRAMS: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Column sums of one block of columns over one segment of rows, and its energies.

    The energies are about the first valid row of all, which makes constant features exactly 0,
    and about the segment's mean, which says how large the features are.
    """
    block, segment = program % blocks, program // blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    first = first_valid_row(mask_ptr, n, HAS_MASK)
    pivot_x = tl.load(
        x_ptr + first.to(tl.int64) * stride_xn + columns.to(tl.int64) * stride_xd,
        mask=(columns < d1) & (first < n), other=0.0,
    ).to(tl.float32)  # fmt: skip
    pivot_y = tl.load(
        y_ptr + first.to(tl.int64) * stride_yn + columns.to(tl.int64) * stride_yd,
        mask=(columns < d2) & (first < n), other=0.0,
    ).to(tl.float32)  # fmt: skip
    zero = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK_R], tl.float32)
    sum_x, sum_y, shifted_x, shifted_y = zero, zero, zero, zero
    square_x, square_y, product = zero, zero, zero
    length = tl.cdiv(tl.cdiv(n, segments), BLOCK_R) * BLOCK_R
    for start in range(segment * length, tl.minimum(n, (segment + 1) * length), BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        valid = valid_rows(mask_ptr, rows, n, HAS_MASK)
        x = _load(x_ptr, stride_xn, stride_xd, rows, valid, columns, d1, zero, False)
        y = _load(y_ptr, stride_yn, stride_yd, rows, valid, columns, d2, zero, False)
        x, y = x.to(tl.float32), y.to(tl.float32)
        sum_x += tl.sum(x, 0)
        sum_y += tl.sum(y, 0)
        x = tl.where(valid[:, None], x - pivot_x[None, :], 0.0)
        y = tl.where(valid[:, None], y - pivot_y[None, :], 0.0)
        shifted_x += tl.sum(x, 0)
        shifted_y += tl.sum(y, 0)
        square_x += tl.sum(x * x, 0)
        square_y += tl.sum(y * y, 0)
        product += tl.sum(x * y, 0)
        count += valid.to(tl.float32)
    tl.store(sums_ptr + segment * width + columns, sum_x, mask=columns < width)
    sums_ptr += segments * width
    tl.store(sums_ptr + segment * width + columns, sum_y, mask=columns < width)
    rows_here = tl.sum(count, 0)
    share = tl.where(rows_here > 0, 1 / rows_here, 0.0)
    out = statistics_ptr + program
    tl.store(out + COUNT * PROGRAMS, tl.where(block == 0, rows_here, 0.0))
    tl.store(out + PIVOT_X * PROGRAMS, tl.sum(square_x, 0))
    tl.store(out + PIVOT_Y * PROGRAMS, tl.sum(square_y, 0))
    tl.store(out + ENERGY_X * PROGRAMS, tl.sum(square_x - shifted_x * shifted_x * share, 0))
    tl.store(out + ENERGY_Y * PROGRAMS, tl.sum(square_y - shifted_y * shifted_y * share, 0))
    tl.store(out + ENERGY_XY * PROGRAMS, tl.sum(product - shifted_x * shifted_y * share, 0))


@triton.jit
def moments_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb, x_descriptor, y_descriptor,
    tiles_ptr, spill_ptr, row_sums_ptr, sums_ptr, statistics_ptr, counters_ptr,
    tile_programs, column_programs, segments, blocks, width, slots, spills,
    LAYERS: tl.constexpr, PROGRAMS: tl.constexpr, HAS_MASK: tl.constexpr,
    GRAM: tl.constexpr, XX: tl.constexpr, YY: tl.constexpr, XY: tl.constexpr,
    SPLIT: tl.constexpr, OFF_DIAGONAL: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Tile programs own a run of (tile, chunk) pairs, column programs a block of columns."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n, d1, d2 = pick(rows, layer), pick(widths_x, layer), pick(widths_y, layer)
    x_ptr = pick(xs, layer) + batch * stride_xb
    y_ptr = pick(ys, layer) + batch * stride_yb
    stride_xn, stride_xd = pick(strides_xn, layer), pick(strides_xd, layer)
    stride_yn, stride_yd = pick(strides_yn, layer), pick(strides_yd, layer)
    mask_ptr = x_ptr
    if HAS_MASK:
        mask_ptr = pick(masks, layer) + batch * stride_mb
    sums_ptr += entry.to(tl.int64) * (2 * segments * width)
    statistics_ptr += entry * 6 * PROGRAMS
    if program == 0:
        # The next launch counts arrivals.
        tl.store(counters_ptr + entry, 0)
    if program >= tile_programs:
        if program - tile_programs < column_programs:
            _column_statistics(
                x_ptr, y_ptr, mask_ptr, n, d1, d2, stride_xn, stride_xd, stride_yn, stride_yd,
                sums_ptr, statistics_ptr, program - tile_programs, segments, blocks, width,
                PROGRAMS, HAS_MASK, BLOCK, BLOCK_R,
            )  # fmt: skip
    else:
        tiles_ptr += entry.to(tl.int64) * slots * (BLOCK * BLOCK)
        spill_ptr += entry.to(tl.int64) * spills * (BLOCK * BLOCK)
        row_sums_ptr += entry.to(tl.int64) * (slots + spills) * (2 * BLOCK + 1)
        blocks_x = tl.cdiv(n if GRAM else d1, BLOCK)
        blocks_y = tl.cdiv(n if GRAM else d2, BLOCK)
        tiles = blocks_x * 0
        if XX:
            tiles += blocks_x * (blocks_x + 1) // 2
        if YY:
            tiles += blocks_y * (blocks_y + 1) // 2
        if XY:
            tiles += blocks_x * blocks_y
        chunks = tl.cdiv(tl.maximum(d1, d2) if GRAM else n, BLOCK_K)
        share = tl.cdiv(tiles * chunks, tile_programs)
        at = program * share
        end = tl.minimum(at + share, tiles * chunks)
        local = tl.arange(0, BLOCK)
        count = n.to(tl.float32)
        if SPLIT:
            count = statistic(statistics_ptr, COUNT, column_programs, PROGRAMS).to(tl.float32)
        while at < end:
            slot = at // chunks
            first = at - slot * chunks
            last = tl.minimum(chunks, first + end - at)
            a_is_y, a_block, b_is_y, b_block = tile_of(slot, blocks_x, blocks_y, XX, YY)
            a_ptr, b_ptr = tl.where(a_is_y, y_ptr, x_ptr), tl.where(b_is_y, y_ptr, x_ptr)
            stride_an = tl.where(a_is_y, stride_yn, stride_xn)
            stride_ad = tl.where(a_is_y, stride_yd, stride_xd)
            stride_bn = tl.where(b_is_y, stride_yn, stride_xn)
            stride_bd = tl.where(b_is_y, stride_yd, stride_xd)
            a_width, b_width = tl.where(a_is_y, d2, d1), tl.where(b_is_y, d2, d1)
            a_side, b_side = a_block * BLOCK + local, b_block * BLOCK + local
            acc = tl.zeros([BLOCK, BLOCK], tl.float32)
            if DESCRIPTORS:
                if a_is_y:
                    a_descriptor = y_descriptor
                else:
                    a_descriptor = x_descriptor
                if b_is_y:
                    b_descriptor = y_descriptor
                else:
                    b_descriptor = x_descriptor
                for chunk in range(first, last):
                    if GRAM:
                        a = a_descriptor.load([a_block * BLOCK, chunk * BLOCK_K])
                        b = b_descriptor.load([b_block * BLOCK, chunk * BLOCK_K])
                    else:
                        a = a_descriptor.load([chunk * BLOCK_K, a_block * BLOCK])
                        b = b_descriptor.load([chunk * BLOCK_K, b_block * BLOCK])
                    acc = _product(a, b, acc, GRAM, SPLIT)
            elif GRAM:
                a_valid = valid_rows(mask_ptr, a_side, n, HAS_MASK)
                b_valid = valid_rows(mask_ptr, b_side, n, HAS_MASK)
                a_sums = sums_ptr + tl.where(a_is_y, width, 0)
                b_sums = sums_ptr + tl.where(b_is_y, width, 0)
                for chunk in range(first, last):
                    columns = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                    a_mean = tl.zeros([BLOCK_K], tl.float32)
                    b_mean = a_mean
                    if SPLIT:
                        # One segment: a loop in here would keep the loads from being pipelined.
                        known = columns < width
                        a_mean = tl.load(a_sums + columns, mask=known, other=0.0) / count
                        b_mean = tl.load(b_sums + columns, mask=known, other=0.0) / count
                    a = _load(
                        a_ptr,
                        stride_an,
                        stride_ad,
                        a_side,
                        a_valid,
                        columns,
                        a_width,
                        a_mean,
                        SPLIT,
                    )
                    b = _load(
                        b_ptr,
                        stride_bn,
                        stride_bd,
                        b_side,
                        b_valid,
                        columns,
                        b_width,
                        b_mean,
                        SPLIT,
                    )
                    acc = _product(a, b, acc, GRAM, SPLIT)
            else:
                a_mean = tl.zeros([BLOCK], tl.float32)
                b_mean = a_mean
                if SPLIT:
                    a_sums = sums_ptr + tl.where(a_is_y, segments * width, 0)
                    b_sums = sums_ptr + tl.where(b_is_y, segments * width, 0)
                    a_mean = column_mean(
                        a_sums, a_side, segments, width, count, a_side < width, BLOCK
                    )
                    b_mean = column_mean(
                        b_sums, b_side, segments, width, count, b_side < width, BLOCK
                    )
                for chunk in range(first, last):
                    row = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                    valid = valid_rows(mask_ptr, row, n, HAS_MASK)
                    a = _load(
                        a_ptr, stride_an, stride_ad, row, valid, a_side, a_width, a_mean, SPLIT
                    )
                    b = _load(
                        b_ptr, stride_bn, stride_bd, row, valid, b_side, b_width, b_mean, SPLIT
                    )
                    acc = _product(a, b, acc, GRAM, SPLIT)
            offsets = local[:, None] * BLOCK + local[None, :]
            if first == 0:
                out = tiles_ptr + slot.to(tl.int64) * (BLOCK * BLOCK)
                part = slot
            else:
                out = spill_ptr + program.to(tl.int64) * (BLOCK * BLOCK)
                part = slots + program
            tl.store(out + offsets, acc)
            if GRAM and not XY:
                if OFF_DIAGONAL:
                    acc = tl.where(a_side[:, None] == b_side[None, :], 0.0, acc)
                sums_out = row_sums_ptr + part * (2 * BLOCK) + local
                tl.store(sums_out, tl.sum(acc, 1))
                tl.store(sums_out + BLOCK, tl.sum(acc, 0))
                # Read back, because triton fails to sum what is left of an accumulator on sm_100.
                tl.debug_barrier()
                total = tl.sum(tl.load(sums_out), 0) * tl.where(a_block == b_block, 1.0, 2.0)
                tl.store(row_sums_ptr + (slots + spills) * (2 * BLOCK) + part, total)
            at += last - first
