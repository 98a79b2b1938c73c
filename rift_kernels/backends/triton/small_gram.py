"""Linear CKA in Gram form with up to 128 rows: from features to the value in one launch.

Each program centers its columns of all rows before it multiplies, in halves; the last one to finish
adds up what all have left, in order, and has the head. See gram.py for the formulae.

Bytes: the features once, both K in float32 once, and once more per program where there are several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    arrive,
    batch_of,
    features_of,
    first_valid_row,
    layer_of,
    mask_of,
    size,
    split,
    valid_rows,
)
from .gram import center_offset, gram_head, inner_product, pack_sums


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
def _gram_of_columns(
    ptr, stride_n, stride_d, row, valid, first, begin, end, width, count,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One side's Gram matrix over some columns, and their energy about the first valid row."""
    k = tl.zeros([ROWS, ROWS], tl.float32)
    energy = 0.0
    end = tl.minimum(end, width)
    for start in range(begin, end, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        x, varies = _centered_columns(
            ptr, stride_n, stride_d, row, valid, first, column, end, count
        )
        energy += varies
        high, low = split(x)
        k = tl.dot(low, tl.trans(high), k)
        k = tl.dot(high, tl.trans(low), k)
        k = tl.dot(high, tl.trans(high), k)
    return k, energy


@triton.jit
def _whole_gram(
    workspace_ptr, side, row, kept, n, DEBIASED: tl.constexpr, ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One side's Gram matrix of features of unit norm; debiased, U-centered.

    And the energy about the first row, the inverse of the norm, and the largest diagonal element.
    """
    SIZE: tl.constexpr = ROWS * ROWS
    square = row[:, None] * ROWS + row[None, :]
    k = tl.zeros([ROWS, ROWS], tl.float32)
    pivot = 0.0
    for program in range(PROGRAMS):
        theirs = workspace_ptr + program * (2 * SIZE + 2)
        k += tl.load(theirs + side * SIZE + square)
        pivot += tl.load(theirs + 2 * SIZE + side)
    diagonal = row[:, None] == row[None, :]
    energy = tl.sum(tl.sum(tl.where(diagonal, k, 0.0), 1), 0)
    inverse = tl.where(energy == 0, 1.0, 1 / tl.sqrt(energy))
    k = k * inverse * inverse
    peak = tl.max(tl.max(tl.where(diagonal, k, 0.0), 1), 0)
    if DEBIASED:
        k = tl.where(kept, k, 0.0)
        total = tl.sum(tl.sum(k, 1), 0)
        # K is symmetric up to rounding, but the sums of its rows and of its columns are its own.
        s = center_offset(tl.sum(k, 1), total, n, DEBIASED)
        t = center_offset(tl.sum(k, 0), total, n, DEBIASED)
        k = k - s[:, None] - t[None, :]
    return tl.where(kept, k, 0.0), pivot, inverse, peak


@triton.jit(do_not_specialize=["share"])
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
    n, d1, d2 = size(rows, layer), size(widths_x, layer), size(widths_y, layer)
    x_ptr, stride_xn, stride_xd = features_of(xs, strides_xn, strides_xd, stride_xb, layer, batch)
    y_ptr, stride_yn, stride_yd = features_of(ys, strides_yn, strides_yd, stride_yb, layer, batch)
    mask_ptr = mask_of(masks, stride_mb, layer, batch, x_ptr, HAS_MASK)
    row = tl.arange(0, ROWS)
    valid = valid_rows(mask_ptr, row, n, HAS_MASK)
    first = first_valid_row(mask_ptr, n, HAS_MASK)
    count = tl.sum(valid.to(tl.float32), 0)
    # A whole number of blocks, which loads of 16 bytes have to know.
    share = share // BLOCK_K * BLOCK_K
    begin = program * share
    end = tl.minimum(begin + share, tl.maximum(d1, d2))
    square = row[:, None] * ROWS + row[None, :]
    SIZE: tl.constexpr = ROWS * ROWS
    workspace_ptr += entry.to(tl.int64) * PROGRAMS * (2 * SIZE + 2)
    mine = workspace_ptr + program * (2 * SIZE + 2)
    # One after the other, because registers hold one accumulator of 128 rows.
    kx, varies = _gram_of_columns(
        x_ptr, stride_xn, stride_xd, row, valid, first, begin, end, d1, count, ROWS, BLOCK_K
    )
    tl.store(mine + square, kx)
    tl.store(mine + 2 * SIZE, varies)
    ky, varies = _gram_of_columns(
        y_ptr, stride_yn, stride_yd, row, valid, first, begin, end, d2, count, ROWS, BLOCK_K
    )
    tl.store(mine + SIZE + square, ky)
    tl.store(mine + 2 * SIZE + 1, varies)
    # Of one program, too: triton cannot reduce an accumulator as it is to a number on sm_100.
    tl.debug_barrier()
    last = program == 0
    if PROGRAMS > 1:
        last = arrive(counters_ptr + entry, PROGRAMS)
    if last:
        tl.debug_barrier()
        if PROGRAMS > 1:
            # Ready for the next call.
            tl.store(counters_ptr + entry, 0)
        kept = valid[:, None] & valid[None, :]
        if DEBIASED:
            kept = kept & (row[:, None] != row[None, :])
        plane = max_rows.to(tl.int64) * max_rows
        grams_ptr += entry * 2 * plane
        inside = (row < n)[:, None] & (row < n)[None, :]
        at = row[:, None] * max_rows + row[None, :]
        kx, pivot_x, inverse_x, peak_x = _whole_gram(
            workspace_ptr, 0, row, kept, count, DEBIASED, ROWS, PROGRAMS
        )
        if STORE:
            tl.store(grams_ptr + at, kx, mask=inside)
        square_x = inner_product(kx, kx)
        # Out of the registers for as long as the other one is made.
        tl.store(mine + square, kx)
        ky, pivot_y, inverse_y, peak_y = _whole_gram(
            workspace_ptr, 1, row, kept, count, DEBIASED, ROWS, PROGRAMS
        )
        if STORE:
            tl.store(grams_ptr + plane + at, ky, mask=inside)
        tl.debug_barrier()
        product = inner_product(tl.load(mine + square), ky)
        sums = pack_sums(square_x, inner_product(ky, ky), product, peak_x, peak_y)
        gram_head(
            values_ptr + entry, scalars_ptr + entry * 8, sums, count.to(tl.float64),
            pivot_x, pivot_y, inverse_x, inverse_y, DEBIASED,
        )  # fmt: skip
