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

from .columns import column_statistics, load_features
from .device import (
    CHUNKS,
    COUNT,
    LONG_COUNT,
    LONG_FIELDS,
    among,
    batch_of,
    column_mean,
    features_of,
    kept_rows,
    layer_of,
    long_rows,
    mask_of,
    size,
    split,
    statistic,
    triangle,
    valid_rows,
)

# Tensor cores cut off what lies two bits below a float32 sum, and then the sum itself, so that a
# sum of N terms of one sign lacks about N 2^-24 of itself, of which the mean's share is larger than
# what is left without the mean. So tiles are summed in runs of rows. A run begins at minus half of
# what it is expected to add, from what the tile has of earlier rows: it ends at plus half, and what
# is cut off towards zero on either side is alike. In a run of 2048 rows the sum is at most 1024
# terms, and products of bfloat16 of this size end above the bits that are cut off. In Gram form
# the terms are few, and what all sums lack alike is centered away. Centered features that are
# loaded an element at a time have more programs instead, of a run's rows at most.
RUN = tl.constexpr(2048)
# A run may be this many times longer than all before it; few rows may be unlike the others.
GROWTH = tl.constexpr(8)


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
def _load_turned(ptr, stride_n, stride_d, rows, valid, columns, width, mean, CENTER: tl.constexpr):
    """As load_features, but (columns, rows): turned in registers, sm_80 could not copy it ahead."""
    mask = valid[None, :] & (columns < width)[:, None]
    offsets = rows.to(tl.int64)[None, :] * stride_n + columns.to(tl.int64)[:, None] * stride_d
    tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    if CENTER:
        tile = tl.where(mask, tile.to(tl.float32) - mean[:, None], 0.0)
    return tile


@triton.jit
def _product(a, b, acc, SPLIT: tl.constexpr):
    """``acc + a b``."""
    if SPLIT:
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _accumulate(
    acc, x_ptr, y_ptr, x_descriptor, y_descriptor, mask_ptr, n, d1, d2,
    stride_xn, stride_xd, stride_yn, stride_yd, longest_ptr, sums_ptr, segments, width, count,
    a_is_y, a_block, b_is_y, b_block, first, last,
    HAS_MASK: tl.constexpr, APART: tl.constexpr, GRAM: tl.constexpr, SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's products over the chunks ``first..last``, added to ``acc``."""
    local = tl.arange(0, BLOCK)
    a_side, b_side = a_block * BLOCK + local, b_block * BLOCK + local
    a_ptr, b_ptr = tl.where(a_is_y, y_ptr, x_ptr), tl.where(b_is_y, y_ptr, x_ptr)
    a_n, a_d = tl.where(a_is_y, stride_yn, stride_xn), tl.where(a_is_y, stride_yd, stride_xd)
    b_n, b_d = tl.where(b_is_y, stride_yn, stride_xn), tl.where(b_is_y, stride_yd, stride_xd)
    a_width, b_width = tl.where(a_is_y, d2, d1), tl.where(b_is_y, d2, d1)
    longest = longest_ptr
    if APART:
        longest = long_rows(longest_ptr)
    if DESCRIPTORS:
        if a_is_y:
            a_descriptor = y_descriptor
        else:
            a_descriptor = x_descriptor
        if b_is_y:
            b_descriptor = y_descriptor
        else:
            b_descriptor = x_descriptor
        chunks = longest_ptr
        if APART:
            chunks = long_rows(longest_ptr + CHUNKS)
        for chunk in range(first, last):
            if GRAM:
                a = a_descriptor.load([a_block * BLOCK, chunk * BLOCK_K])
                b = tl.trans(b_descriptor.load([b_block * BLOCK, chunk * BLOCK_K]))
            else:
                at = chunk * BLOCK_K
                if APART:
                    # The copy engine masks no row. Behind the last one it reads zeros.
                    at = tl.where(among(chunk, chunks), n, at)
                a = tl.trans(a_descriptor.load([at, a_block * BLOCK]))
                b = b_descriptor.load([at, b_block * BLOCK])
            acc = _product(a, b, acc, SPLIT)
        if APART:
            for slot in range(tl.load(longest_ptr + LONG_COUNT)):
                chunk = tl.load(longest_ptr + CHUNKS + slot)
                if (chunk >= first) & (chunk < last):
                    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                    kept = kept_rows(mask_ptr, longest, k, n, False, True)
                    a = _load_turned(a_ptr, a_n, a_d, k, kept, a_side, a_width, count, False)
                    b = load_features(b_ptr, b_n, b_d, k, kept, b_side, b_width, count, False)
                    acc = _product(a, b, acc, SPLIT)
    else:
        a_sums = sums_ptr + tl.where(a_is_y, segments * width, 0)
        b_sums = sums_ptr + tl.where(b_is_y, segments * width, 0)
        if GRAM:
            a_valid = valid_rows(mask_ptr, a_side, n, HAS_MASK)
            b_valid = valid_rows(mask_ptr, b_side, n, HAS_MASK)
            for chunk in range(first, last):
                k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                a_mean = tl.zeros([BLOCK_K], tl.float32)
                b_mean = a_mean
                if SPLIT:
                    # One segment: a loop in here would keep the loads from being pipelined.
                    a_mean = tl.load(a_sums + k, mask=k < width, other=0.0) / count
                    b_mean = tl.load(b_sums + k, mask=k < width, other=0.0) / count
                a = load_features(a_ptr, a_n, a_d, a_side, a_valid, k, a_width, a_mean, SPLIT)
                b = load_features(b_ptr, b_n, b_d, b_side, b_valid, k, b_width, b_mean, SPLIT)
                acc = _product(a, tl.trans(b), acc, SPLIT)
        else:
            a_mean = tl.zeros([BLOCK], tl.float32)
            b_mean = a_mean
            if SPLIT:
                a_mean = column_mean(a_sums, a_side, segments, width, count, a_side < width, BLOCK)
                b_mean = column_mean(b_sums, b_side, segments, width, count, b_side < width, BLOCK)
            for chunk in range(first, last):
                k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                valid = kept_rows(mask_ptr, longest, k, n, HAS_MASK, APART)
                a = _load_turned(a_ptr, a_n, a_d, k, valid, a_side, a_width, a_mean, SPLIT)
                b = load_features(b_ptr, b_n, b_d, k, valid, b_side, b_width, b_mean, SPLIT)
                acc = _product(a, b, acc, SPLIT)
    return acc


@triton.jit
def _rows(mask_ptr, begin, end, n, HAS_MASK: tl.constexpr):
    """How many of up to RUN rows there are, as a float32."""
    end = tl.minimum(end, n)
    rows = (end - begin).to(tl.float32)
    if HAS_MASK:
        rows = tl.sum(valid_rows(mask_ptr, begin + tl.arange(0, RUN), end, True).to(tl.float32), 0)
    return rows


@triton.jit(
    do_not_specialize=[
        *("stride_xb", "stride_yb", "stride_mb"),
        *("tile_programs", "column_programs", "columns_here", "segments", "blocks", "slots"),
        *("spills",),
    ]
)
def moments_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb, x_descriptor, y_descriptor, longest_ptr,
    tiles_ptr, spill_ptr, row_sums_ptr, sums_ptr, statistics_ptr, counters_ptr,
    tile_programs, column_programs, columns_here, segments, blocks, width, slots, spills,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    APART: tl.constexpr, GRAM: tl.constexpr, XX: tl.constexpr, YY: tl.constexpr, XY: tl.constexpr,
    SPLIT: tl.constexpr, OFF_DIAGONAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Tile programs own a run of (tile, chunk) pairs, column programs a block of columns."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n, d1, d2 = size(rows, layer), size(widths_x, layer, VECTOR), size(widths_y, layer, VECTOR)
    x_ptr, stride_xn, stride_xd = features_of(
        xs, strides_xn, strides_xd, stride_xb, layer, batch, DTYPE, VECTOR
    )
    y_ptr, stride_yn, stride_yd = features_of(
        ys, strides_yn, strides_yd, stride_yb, layer, batch, DTYPE, VECTOR
    )
    mask_ptr = mask_of(masks, stride_mb, layer, batch, x_ptr, HAS_MASK)
    sums_ptr += entry.to(tl.int64) * (2 * segments * width)
    statistics_ptr += entry * 6 * column_programs
    if APART:
        longest_ptr += entry * LONG_FIELDS
    if program == 0:
        # The next launch counts arrivals.
        tl.store(counters_ptr + entry, 0)
    # They come first, and leave in the L2 cache what the tile programs read.
    if program < columns_here:
        longest = longest_ptr
        if APART:
            longest = long_rows(longest_ptr)
        column_statistics(
            x_ptr, y_ptr, mask_ptr, n, d1, d2, stride_xn, stride_xd, stride_yn, stride_yd,
            longest, sums_ptr, statistics_ptr, program, segments, blocks, width,
            HAS_MASK, APART, BLOCK, BLOCK_R,
        )  # fmt: skip
    else:
        program -= columns_here
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
            count = statistic(statistics_ptr, COUNT, column_programs).to(tl.float32)
        while at < end:
            slot = at // chunks
            first = at - slot * chunks
            last = tl.minimum(chunks, first + end - at)
            a_is_y, a_block, b_is_y, b_block = tile_of(slot, blocks_x, blocks_y, XX, YY)
            a_side, b_side = a_block * BLOCK + local, b_block * BLOCK + local
            acc = tl.zeros([BLOCK, BLOCK], tl.float32)
            # Nor do registers hold a sum of runs beside addresses of single elements and halves.
            if GRAM or (SPLIT and VECTOR <= 1):
                acc = _accumulate(
                    acc, x_ptr, y_ptr, x_descriptor, y_descriptor, mask_ptr, n, d1, d2,
                    stride_xn, stride_xd, stride_yn, stride_yd, longest_ptr,
                    sums_ptr, segments, width, count, a_is_y, a_block, b_is_y, b_block, first, last,
                    HAS_MASK, APART, GRAM, SPLIT, DESCRIPTORS, BLOCK, BLOCK_K,
                )  # fmt: skip
            else:
                # In runs, see RUN.
                added = (n * 0).to(tl.float32)
                done = first
                while done < last:
                    known = (added * (GROWTH / BLOCK_K)).to(tl.int32)
                    stop = done + tl.minimum(tl.maximum(known, 1), RUN // BLOCK_K)
                    stop = tl.minimum(stop, last)
                    here = _rows(mask_ptr, done * BLOCK_K, stop * BLOCK_K, n, HAS_MASK)
                    # Of few digits, so that 1 more is exact; at first it has nothing to weigh.
                    weight = (here / (2 * tl.maximum(added, 1))).to(tl.bfloat16).to(tl.float32)
                    acc = (1 + weight) * acc + _accumulate(
                        -weight * acc, x_ptr, y_ptr, x_descriptor, y_descriptor, mask_ptr,
                        n, d1, d2,
                        stride_xn, stride_xd, stride_yn, stride_yd, longest_ptr,
                        sums_ptr, segments, width,
                        count, a_is_y, a_block, b_is_y, b_block, done, stop,
                        HAS_MASK, APART, GRAM, SPLIT, DESCRIPTORS, BLOCK, BLOCK_K,
                    )  # fmt: skip
                    added += here
                    done = stop
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
