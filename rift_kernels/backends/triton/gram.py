"""Linear CKA in Gram form: ``K = X X^T`` of either side, centered, and its head.

    biased      centered on both sides: ``K - s_i - s_j``, s from the row sums
    debiased    U-centered: the same without the diagonal, which becomes 0 (Szekely & Rizzo 2014)

    value = <Kx, Ky> / (||Kx|| ||Ky||),   grad_X = M Xc,   M = (2 / ||Kx||) (Ky / ||Ky|| - value Kx / ||Kx||)

M is formed in float32 by the backward, from both K. With up to 128 rows everything up to the value
is one launch (:func:`small_gram_kernel`): each program centers its columns of all rows before it
multiplies, and the last one to finish has the head.

Bytes: the partial tiles once, both K in float32 once written and once per tile of the gradient.
"""  # noqa: E501

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    COUNT,
    ENERGY_X,
    ENERGY_Y,
    PIVOT_X,
    PIVOT_Y,
    arrive,
    batch_of,
    column_mean,
    first_valid_row,
    inverse_scale,
    layer_of,
    pick,
    split,
    statistic,
    sum_partials,
    triangle,
    triangle_index,
    valid_rows,
)

# Sums that the programs leave to the last of them.
SQUARE_X = tl.constexpr(0)
SQUARE_Y = tl.constexpr(1)
PRODUCT = tl.constexpr(2)
# The largest squared norm of a row: a maximum, not a sum.
PEAK_X = tl.constexpr(3)
PEAK_Y = tl.constexpr(4)
FIELDS = tl.constexpr(8)

# Scalars for the backward, for each side.
OWN = tl.constexpr(0)
OTHER = tl.constexpr(1)
ROWS = tl.constexpr(2)
INVERSE = tl.constexpr(3)
SCALARS = 8

NOISE = tl.constexpr(4 * 2.0**-23)


@triton.jit
def _inner(a, b):
    return tl.sum(tl.sum(a.to(tl.float64) * b.to(tl.float64), 1), 0)


@triton.jit
def _field(sums, field):
    return tl.sum(tl.where(tl.arange(0, FIELDS) == field, sums, 0.0), 0)


@triton.jit
def _pack(square_x, square_y, product, peak_x, peak_y):
    field = tl.arange(0, FIELDS)
    sums = tl.where(field == SQUARE_X, square_x, 0.0)
    sums = tl.where(field == SQUARE_Y, square_y, sums)
    sums = tl.where(field == PRODUCT, product, sums)
    sums = tl.where(field == PEAK_X, peak_x.to(tl.float64), sums)
    return tl.where(field == PEAK_Y, peak_y.to(tl.float64), sums)


@triton.jit
def _store_side(scalars_ptr, n, own, other, inverse):
    tl.store(scalars_ptr + OWN, own.to(tl.float32))
    tl.store(scalars_ptr + OTHER, other.to(tl.float32))
    tl.store(scalars_ptr + ROWS, n.to(tl.float32))
    # Apart from the rest, because its square may not be a float32.
    tl.store(scalars_ptr + INVERSE, inverse)


@triton.jit
def _head(
    value_ptr, scalars_ptr, sums, n, pivot_x, pivot_y, inverse_x, inverse_y, DEBIASED: tl.constexpr
):
    """The scalars of one layer, in float64; K of features scaled by the inverses."""
    xx, yy, xy = _field(sums, SQUARE_X), _field(sums, SQUARE_Y), _field(sums, PRODUCT)
    dead = (pivot_x == 0) | (pivot_y == 0)
    fewest = 2
    if DEBIASED:
        fewest = 4
        # What is left of the largest row by less than this is made of rounding.
        dead = dead | (tl.sqrt(xx) <= _field(sums, PEAK_X) * NOISE)
        dead = dead | (tl.sqrt(yy) <= _field(sums, PEAK_Y) * NOISE)
    beta = tl.where(dead, 0.0, 2 / tl.sqrt(tl.where(dead, 1.0, xx * yy)))
    value = 0.5 * xy * beta
    # NaN and Inf in the features come through where nothing varies, too.
    value += (pivot_x - pivot_x) + (pivot_y - pivot_y)
    value = tl.where(n < fewest, float("nan"), value)
    beta += value - value
    tl.store(value_ptr, value.to(tl.float32))
    alpha_x = tl.where(dead, 0.0, -2 * value / tl.where(dead, 1.0, xx))
    alpha_y = tl.where(dead, 0.0, -2 * value / tl.where(dead, 1.0, yy))
    _store_side(scalars_ptr, n, alpha_x, beta, inverse_x)
    _store_side(scalars_ptr + 4, n, alpha_y, beta, inverse_y)


@triton.jit
def _offsets(row_sum, total, n, DEBIASED: tl.constexpr):
    """``s`` of a row: what is taken off its row and its column."""
    if DEBIASED:
        s = (row_sum - total / (2 * (n - 1))) / (n - 2)
    else:
        s = (row_sum - total / (2 * n)) / n
    return s


@triton.jit
def _begins_within(program, share, chunks, tiles):
    """Whether a program left a spill, because it began in the middle of a tile."""
    begin = program * share
    return (begin % chunks != 0) & (begin < tiles * chunks)


@triton.jit
def _row_sums(
    sums_ptr, first_slot, block, blocks, within, chunks, share, slots, BLOCK: tl.constexpr
):
    """Row sums of some rows of K, over the tiles of their block's row and column."""
    total = tl.zeros(within.shape, tl.float32)
    for other in range(blocks):
        pair = triangle_index(tl.minimum(block, other), tl.maximum(block, other))
        side = tl.where(other < block, BLOCK, 0)
        slot = first_slot + pair
        total += tl.load(sums_ptr + slot * (2 * BLOCK) + side + within)
        begin = slot * chunks
        for program in range(begin // share + 1, (begin + chunks - 1) // share + 1):
            total += tl.load(sums_ptr + (slots + program) * (2 * BLOCK) + side + within)
    return total


@triton.jit
def _total(totals_ptr, first_slot, tiles, chunks, share, slots, spills, all_tiles):
    """The sum of all of K."""
    several = tl.arange(0, 256)
    total = tl.zeros([256], tl.float64)
    for start in range(0, tiles, 256):
        slot = first_slot + start + several
        total += tl.load(totals_ptr + slot, mask=start + several < tiles, other=0.0)
    for start in range(0, spills, 256):
        program = start + several
        slot = program * share // chunks
        mine = (slot >= first_slot) & (slot < first_slot + tiles) & (program < spills)
        mine = mine & _begins_within(program, share, chunks, all_tiles)
        total += tl.load(totals_ptr + slots + program, mask=mine, other=0.0)
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def _centered_tile(
    tiles_ptr, spill_ptr, row_sums_ptr, totals_ptr, first_slot, pair, block_i, block_j,
    within_i, within_j, offsets, diagonal, kept, n, scale, blocks, tiles, chunks, share,
    slots, spills, DEBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of one side's K, centered and scaled, and its largest element on the diagonal."""
    k = sum_partials(
        tiles_ptr, spill_ptr, first_slot + pair, chunks, share, offsets, BLOCK * BLOCK
    )
    total = _total(totals_ptr, first_slot, tiles, chunks, share, slots, spills, 2 * tiles)
    sums_i = _row_sums(
        row_sums_ptr, first_slot, block_i, blocks, within_i, chunks, share, slots, BLOCK
    )
    sums_j = _row_sums(
        row_sums_ptr, first_slot, block_j, blocks, within_j, chunks, share, slots, BLOCK
    )
    peak = tl.max(tl.max(tl.where(diagonal, k, 0.0), 1), 0) * scale
    k = k - _offsets(sums_i, total, n, DEBIASED)[:, None]
    k = k - _offsets(sums_j, total, n, DEBIASED)[None, :]
    return tl.where(kept, k * scale, 0.0), peak


@triton.jit
def gram_kernel(
    masks, rows, widths_x, widths_y, stride_mb,
    tiles_ptr, spill_ptr, row_sums_ptr, statistics_ptr, counters_ptr,
    values_ptr, scalars_ptr, grams_ptr, partial_ptr,
    tile_programs, column_programs, slots, spills, max_rows,
    LAYERS: tl.constexpr, PROGRAMS: tl.constexpr, HAS_MASK: tl.constexpr,
    DEBIASED: tl.constexpr, STORE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One program owns SUB rows of one tile of both Kx and Ky."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    programs = tl.num_programs(0)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n = pick(rows, layer)
    SIZE: tl.constexpr = BLOCK * BLOCK
    PARTS: tl.constexpr = BLOCK // SUB
    statistics_ptr += entry * 6 * PROGRAMS
    tiles_ptr += entry.to(tl.int64) * slots * SIZE
    spill_ptr += entry.to(tl.int64) * spills * SIZE
    row_sums_ptr += entry.to(tl.int64) * (slots + spills) * (2 * BLOCK + 1)
    totals_ptr = row_sums_ptr + (slots + spills) * (2 * BLOCK)
    partial_ptr += entry.to(tl.int64) * programs * FIELDS
    mask_ptr = statistics_ptr
    if HAS_MASK:
        mask_ptr = pick(masks, layer) + batch * stride_mb
    count = statistic(statistics_ptr, COUNT, column_programs, PROGRAMS)
    inverse_x = inverse_scale(statistics_ptr, PIVOT_X, ENERGY_X, column_programs, PROGRAMS)
    inverse_y = inverse_scale(statistics_ptr, PIVOT_Y, ENERGY_Y, column_programs, PROGRAMS)
    n_float = count.to(tl.float32)
    blocks = tl.cdiv(n, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    chunks = tl.cdiv(tl.maximum(pick(widths_x, layer), pick(widths_y, layer)), BLOCK_K)
    share = tl.cdiv(2 * tiles * chunks, tile_programs)
    sums = tl.zeros([FIELDS], tl.float64)
    pair, part = program // PARTS, program % PARTS
    if pair < tiles:
        block_i, block_j = triangle(pair)
        within_i = part * SUB + tl.arange(0, SUB)
        within_j = tl.arange(0, BLOCK)
        i, j = block_i * BLOCK + within_i, block_j * BLOCK + within_j
        offsets = within_i[:, None] * BLOCK + within_j[None, :]
        inside = valid_rows(mask_ptr, i, n, HAS_MASK)[:, None]
        inside = inside & valid_rows(mask_ptr, j, n, HAS_MASK)[None, :]
        diagonal = i[:, None] == j[None, :]
        kept = inside
        if DEBIASED:
            kept = inside & (i[:, None] != j[None, :])
        plane = max_rows.to(tl.int64) * max_rows
        grams_ptr += entry * 2 * plane
        direct = i.to(tl.int64)[:, None] * max_rows + j[None, :]
        turned = j.to(tl.int64)[None, :] * max_rows + i[:, None]
        bounds = (i < n)[:, None] & (j < n)[None, :]
        scale_x, scale_y = inverse_x * inverse_x, inverse_y * inverse_y
        kx, peak_x = _centered_tile(
            tiles_ptr, spill_ptr, row_sums_ptr, totals_ptr, 0, pair, block_i, block_j,
            within_i, within_j, offsets, inside & diagonal, kept, n_float, scale_x,
            blocks, tiles, chunks, share, slots, spills, DEBIASED, BLOCK,
        )  # fmt: skip
        ky, peak_y = _centered_tile(
            tiles_ptr, spill_ptr, row_sums_ptr, totals_ptr, tiles, pair, block_i, block_j,
            within_i, within_j, offsets, inside & diagonal, kept, n_float, scale_y,
            blocks, tiles, chunks, share, slots, spills, DEBIASED, BLOCK,
        )  # fmt: skip
        if STORE:
            tl.store(grams_ptr + direct, kx, mask=bounds)
            tl.store(grams_ptr + turned, kx, mask=bounds)
            tl.store(grams_ptr + plane + direct, ky, mask=bounds)
            tl.store(grams_ptr + plane + turned, ky, mask=bounds)
        twice = tl.where(block_i == block_j, 1.0, 2.0)
        sums = _pack(
            twice * _inner(kx, kx), twice * _inner(ky, ky), twice * _inner(kx, ky), peak_x, peak_y
        )
    field = tl.arange(0, FIELDS)
    tl.store(partial_ptr + program * FIELDS + field, sums)
    if arrive(counters_ptr + entry, programs):
        tl.debug_barrier()
        total = tl.zeros([FIELDS], tl.float64)
        peak = tl.zeros([FIELDS], tl.float64)
        several = tl.arange(0, 32)
        for first in range(0, programs, 32):
            which = first + several
            theirs = tl.load(
                partial_ptr + which[:, None] * FIELDS + field[None, :],
                mask=(which < programs)[:, None], other=0.0,
            )  # fmt: skip
            total += tl.sum(theirs, 0)
            peak = tl.maximum(peak, tl.max(theirs, 0))
        total = tl.where((field == PEAK_X) | (field == PEAK_Y), peak, total)
        pivot_x = statistic(statistics_ptr, PIVOT_X, column_programs, PROGRAMS)
        pivot_y = statistic(statistics_ptr, PIVOT_Y, column_programs, PROGRAMS)
        _head(
            values_ptr + entry, scalars_ptr + entry * 8, total, count, pivot_x, pivot_y,
            inverse_x, inverse_y, DEBIASED,
        )  # fmt: skip


@triton.jit
def _centered_columns(ptr, stride_n, stride_d, row, valid, first, column, width, count):
    """Columns of all rows, centered: exactly 0 where they are constant. And their energy."""
    inside = (column < width)[None, :]
    offsets = row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
    mask = valid[:, None] & inside
    x = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(tl.where((row == first)[:, None], x, 0.0), 0)
    x = tl.where(mask, x - pivot[None, :], 0.0)
    varies = tl.sum(tl.sum(x * x, 1), 0)
    x = tl.where(mask, x - (tl.sum(x, 0) / count)[None, :], 0.0)
    return tl.where(mask, x - (tl.sum(x, 0) / count)[None, :], 0.0), varies


@triton.jit
def _accumulate(k, x):
    high, low = split(x)
    k = tl.dot(low, tl.trans(high), k)
    k = tl.dot(high, tl.trans(low), k)
    return tl.dot(high, tl.trans(high), k)


@triton.jit
def _u_center(k, kept, n, DEBIASED: tl.constexpr):
    if DEBIASED:
        k = tl.where(kept, k, 0.0)
        sums = tl.sum(k, 1)
        s = _offsets(sums, tl.sum(sums, 0), n, DEBIASED)
        # K is symmetric up to rounding: its row sums serve as column sums.
        t = _offsets(tl.sum(k, 0), tl.sum(sums, 0), n, DEBIASED)
        k = k - s[:, None] - t[None, :]
    return tl.where(kept, k, 0.0)


@triton.jit
def small_gram_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb,
    workspace_ptr, counters_ptr, values_ptr, scalars_ptr, grams_ptr, max_rows, share,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DEBIASED: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One program owns ``share`` columns of all rows of one layer, the last one the head."""
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
    row = tl.arange(0, ROWS)
    valid = valid_rows(mask_ptr, row, n, HAS_MASK)
    first = first_valid_row(mask_ptr, n, HAS_MASK)
    count = tl.sum(valid.to(tl.float32), 0)
    kx = tl.zeros([ROWS, ROWS], tl.float32)
    ky = tl.zeros([ROWS, ROWS], tl.float32)
    pivot_x, pivot_y = 0.0, 0.0
    begin = program * share
    end = tl.minimum(begin + share, tl.maximum(d1, d2))
    for start in range(begin, end, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        x, varies = _centered_columns(
            x_ptr, stride_xn, stride_xd, row, valid, first, column, tl.minimum(d1, end), count
        )
        pivot_x += varies
        kx = _accumulate(kx, x)
        y, varies = _centered_columns(
            y_ptr, stride_yn, stride_yd, row, valid, first, column, tl.minimum(d2, end), count
        )
        pivot_y += varies
        ky = _accumulate(ky, y)
    square = row[:, None] * ROWS + row[None, :]
    SIZE: tl.constexpr = ROWS * ROWS
    last = program == 0
    if PROGRAMS > 1:
        workspace_ptr += entry.to(tl.int64) * PROGRAMS * (2 * SIZE + 2)
        mine = workspace_ptr + program * (2 * SIZE + 2)
        tl.store(mine + square, kx)
        tl.store(mine + SIZE + square, ky)
        tl.store(mine + 2 * SIZE, pivot_x)
        tl.store(mine + 2 * SIZE + 1, pivot_y)
        last = arrive(counters_ptr + entry, PROGRAMS)
    if last:
        if PROGRAMS > 1:
            tl.debug_barrier()
            # Ready for the next call.
            tl.store(counters_ptr + entry, 0)
            kx = tl.zeros([ROWS, ROWS], tl.float32)
            ky = tl.zeros([ROWS, ROWS], tl.float32)
            pivot_x, pivot_y = 0.0, 0.0
            for other in range(PROGRAMS):
                theirs = workspace_ptr + other * (2 * SIZE + 2)
                kx += tl.load(theirs + square)
                ky += tl.load(theirs + SIZE + square)
                pivot_x += tl.load(theirs + 2 * SIZE)
                pivot_y += tl.load(theirs + 2 * SIZE + 1)
        diagonal = row[:, None] == row[None, :]
        energy_x = tl.sum(tl.sum(tl.where(diagonal, kx, 0.0), 1), 0)
        energy_y = tl.sum(tl.sum(tl.where(diagonal, ky, 0.0), 1), 0)
        inverse_x = tl.where(energy_x == 0, 1.0, 1 / tl.sqrt(energy_x))
        inverse_y = tl.where(energy_y == 0, 1.0, 1 / tl.sqrt(energy_y))
        kx = kx * inverse_x * inverse_x
        ky = ky * inverse_y * inverse_y
        peak_x = tl.max(tl.max(tl.where(diagonal, kx, 0.0), 1), 0)
        peak_y = tl.max(tl.max(tl.where(diagonal, ky, 0.0), 1), 0)
        kept = valid[:, None] & valid[None, :]
        if DEBIASED:
            kept = kept & (row[:, None] != row[None, :])
        kx = _u_center(kx, kept, count, DEBIASED)
        ky = _u_center(ky, kept, count, DEBIASED)
        if STORE:
            plane = max_rows.to(tl.int64) * max_rows
            grams_ptr += entry * 2 * plane
            inside = (row < n)[:, None] & (row < n)[None, :]
            at = row[:, None] * max_rows + row[None, :]
            tl.store(grams_ptr + at, kx, mask=inside)
            tl.store(grams_ptr + plane + at, ky, mask=inside)
        sums = _pack(_inner(kx, kx), _inner(ky, ky), _inner(kx, ky), peak_x, peak_y)
        _head(
            values_ptr + entry, scalars_ptr + entry * 8, sums, count.to(tl.float64),
            pivot_x.to(tl.float64), pivot_y.to(tl.float64), inverse_x, inverse_y, DEBIASED,
        )  # fmt: skip


@triton.jit
def gram_backward_kernel(
    owns, masks, grads, rows, widths, strides_n, strides_d, stride_b, stride_mb, stride_gb,
    incoming_ptr, grams_ptr, scalars_ptr, sums_ptr, width, max_rows, max_width,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, SIDE: tl.constexpr,
    SMALL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of ``grad = g M X``; the rows of M sum to 0, so X may have a mean."""
    entry = tl.program_id(1)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n, d = pick(rows, layer), pick(widths, layer)
    blocks_n = tl.cdiv(max_width, BLOCK_N)
    block_m, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    if (block_m * BLOCK_M < n) & (block_n * BLOCK_N < d):
        x_ptr = pick(owns, layer) + batch * stride_b
        grad_ptr = pick(grads, layer) + batch * stride_gb
        stride_n, stride_d = pick(strides_n, layer), pick(strides_d, layer)
        mask_ptr = x_ptr
        if HAS_MASK:
            mask_ptr = pick(masks, layer) + batch * stride_mb
        scalars_ptr += entry * 8 + SIDE * 4
        incoming = tl.load(incoming_ptr + entry).to(tl.float32)
        c_own = tl.load(scalars_ptr + OWN)
        c_other = tl.load(scalars_ptr + OTHER)
        plane = max_rows.to(tl.int64) * max_rows
        own_ptr = grams_ptr + (entry * 2 + SIDE) * plane
        other_ptr = grams_ptr + (entry * 2 + 1 - SIDE) * plane
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mean = tl.zeros([BLOCK_N], tl.float32)
        if EXACT and not SMALL:
            sums = tl.load(
                sums_ptr + (entry * 2 + SIDE) * width + column, mask=column < d, other=0.0
            )
            mean = sums / tl.load(scalars_ptr + ROWS)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, n, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at = row.to(tl.int64)[:, None] * max_rows + k[None, :]
            inside = (row < n)[:, None] & (k < n)[None, :]
            own = tl.load(own_ptr + at, mask=inside, other=0.0)
            other = tl.load(other_ptr + at, mask=inside, other=0.0)
            high, low = split(c_own * own + c_other * other)
            valid = valid_rows(mask_ptr, k, n, HAS_MASK)
            mask = valid[:, None] & (column < d)[None, :]
            offsets = k.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
            if EXACT:
                x = x.to(tl.float32)
                if SMALL:
                    mean = tl.sum(x, 0) / tl.sum(valid.to(tl.float32), 0)
                x_high, x_low = split(tl.where(mask, x - mean[None, :], 0.0))
                acc = tl.dot(low, x_high, acc)
                acc = tl.dot(high, x_low, acc)
                acc = tl.dot(high, x_high, acc)
            else:
                acc = tl.dot(low, x, acc)
                acc = tl.dot(high, x, acc)
        valid = valid_rows(mask_ptr, row, n, HAS_MASK)
        inverse = tl.load(scalars_ptr + INVERSE)
        acc = tl.where(valid[:, None], acc * inverse * (inverse * incoming), 0.0)
        offsets = row.to(tl.int64)[:, None] * d + column[None, :]
        inside = (row < n)[:, None] & (column < d)[None, :]
        tl.store(grad_ptr + offsets, acc.to(grad_ptr.dtype.element_ty), mask=inside)
