"""Linear CKA in Gram form, for up to 128 rows: from features to values in one launch.

Each program centers its columns over all rows, then multiplies them in halves. The last one to
finish adds up what all have left, in a fixed order, and has the head. gram_cka.py has the formulae.

Bytes: the features once, both K in float32 once, and once more per program if there are several.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config
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
from .gram_cka_head import center_offset, gram_cka_head, inner_product, pack_sums
from .gram_saved import SCALARS, Saved, edge_of, grams_of, stride_of
from .launch import round_up
from .layers import Layers

SMALL_GRAM_ROWS = 128


@triton.jit
def _centered_columns(ptr, stride_n, stride_d, row, valid, first, column, width, count):
    """Centered columns of all rows, exactly 0 if constant, and their energy about the first row."""
    columns = column.to(tl.int64) * stride_d
    mask = valid[:, None] & (column < width)[None, :]
    x = tl.load(ptr + row.to(tl.int64)[:, None] * stride_n + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    pivot = tl.load(
        ptr + first.to(tl.int64) * stride_n + columns, mask=column < width, other=0.0
    ).to(tl.float32)
    x = tl.where(mask, x - pivot[None, :], 0.0)
    varies = tl.sum(tl.sum(x * x, 1), 0)
    x = tl.where(mask, x - (tl.sum(x, 0) / count)[None, :], 0.0)
    return tl.where(mask, x - (tl.sum(x, 0) / count)[None, :], 0.0), varies


@triton.jit
def _gram_of_columns(
    ptr, stride_n, stride_d, row, valid, first, begin, end, width, count, out_ptr, energy_ptr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store one side's Gram matrix over some columns, and their energy about the first row."""
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
    tl.store(out_ptr + row[:, None] * ROWS + row[None, :], k)
    tl.store(energy_ptr, energy)


@triton.jit
def _add_up(
    workspace_ptr, part_ptr, side, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, STRIP: tl.constexpr
):
    """Store one side's Gram matrix over all programs in this program's part.

    Returns its diagonal, the sums of its columns without the diagonal, and the energy about the
    first row.
    """
    PART: tl.constexpr = 2 * ROWS * ROWS + 4
    column = tl.arange(0, ROWS)
    diagonal = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    for first in tl.static_range(0, ROWS, STRIP):
        row = first + tl.arange(0, STRIP)
        offsets = side * ROWS * ROWS + row[:, None] * ROWS + column[None, :]
        k = tl.load(workspace_ptr + offsets)
        for program in range(1, PROGRAMS):
            k += tl.load(workspace_ptr + program * PART + offsets)
        if PROGRAMS > 1:
            tl.store(part_ptr + offsets, k)
        on_diagonal = row[:, None] == column[None, :]
        diagonal += tl.sum(tl.where(on_diagonal, k, 0.0), 0)
        sums += tl.sum(tl.where(on_diagonal, 0.0, k), 0)
    pivot = 0.0
    for program in range(PROGRAMS):
        pivot += tl.load(workspace_ptr + program * PART + 2 * ROWS * ROWS + side)
    return diagonal, sums, pivot


@triton.jit
def _centered_rows(k_ptr, offsets, included, inverse, sums, n, DEBIASED: tl.constexpr):
    """Some rows of a Gram matrix of features of unit norm; debiased, U-centered."""
    k = tl.load(k_ptr + offsets) * inverse * inverse
    if DEBIASED:
        k = tl.where(included, k, 0.0)
        # Rounding makes K slightly asymmetric, so its rows and its columns have different sums.
        total = tl.sum(sums, 0)
        s = center_offset(tl.sum(k, 1), total, n, DEBIASED)
        k = k - s[:, None] - center_offset(sums, total, n, DEBIASED)[None, :]
    return tl.where(included, k, 0.0)


@triton.jit(do_not_specialize=["stride_xb", "stride_yb", "stride_mb", "share"])
def gram_cka_small_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb,
    workspace_ptr, counters_ptr, values_ptr, saved_ptr, stride, share,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    DEBIASED: tl.constexpr, DISTANCE: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One program owns ``share`` columns of all rows of one layer; the last one has the head."""
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
    row = tl.arange(0, ROWS)
    valid = valid_rows(mask_ptr, row, n, HAS_MASK)
    # Any row, if none is valid.
    first = tl.minimum(first_valid_row(mask_ptr, n, HAS_MASK), n - 1)
    count = tl.sum(valid.to(tl.float32), 0)
    # Loads of 16 bytes need to know that this is a whole number of blocks.
    share = share // BLOCK_K * BLOCK_K
    begin = program * share
    end = tl.minimum(begin + share, tl.maximum(d1, d2))
    SIZE: tl.constexpr = ROWS * ROWS
    STRIP: tl.constexpr = 32 if ROWS > 32 else ROWS
    workspace_ptr += entry.to(tl.int64) * PROGRAMS * (2 * SIZE + 4)
    part_ptr = workspace_ptr + program * (2 * SIZE + 4)
    # One side after the other, because registers hold one accumulator of 128 rows.
    _gram_of_columns(
        x_ptr, stride_xn, stride_xd, row, valid, first, begin, end, d1, count,
        part_ptr, part_ptr + 2 * SIZE, ROWS, BLOCK_K,
    )  # fmt: skip
    _gram_of_columns(
        y_ptr, stride_yn, stride_yd, row, valid, first, begin, end, d2, count,
        part_ptr + SIZE, part_ptr + 2 * SIZE + 1, ROWS, BLOCK_K,
    )  # fmt: skip
    # Even a single program reads sums back, because triton cannot reduce accumulators on sm_100.
    tl.debug_barrier()
    last = program == 0
    if PROGRAMS > 1:
        last = arrive(counters_ptr + entry, PROGRAMS)
    if last:
        tl.debug_barrier()
        diagonal_x, sums_x, pivot_x = _add_up(workspace_ptr, part_ptr, 0, PROGRAMS, ROWS, STRIP)
        diagonal_y, sums_y, pivot_y = _add_up(workspace_ptr, part_ptr, 1, PROGRAMS, ROWS, STRIP)
        energy_x, energy_y = tl.sum(diagonal_x, 0), tl.sum(diagonal_y, 0)
        inverse_x = tl.where(energy_x == 0, 1.0, 1 / tl.sqrt(energy_x))
        inverse_y = tl.where(energy_y == 0, 1.0, 1 / tl.sqrt(energy_y))
        sums_x, sums_y = sums_x * inverse_x * inverse_x, sums_y * inverse_y * inverse_y
        plane = stride.to(tl.int64) * stride
        edge = edge_of(n)
        grams_ptr = grams_of(saved_ptr, entry, plane)
        square_x = count.to(tl.float64) * 0
        square_y, product = square_x, square_x
        tl.debug_barrier()
        # In strips, because registers do not hold two matrices of 128 rows.
        for start in tl.static_range(0, ROWS, STRIP):
            i = start + tl.arange(0, STRIP)
            included = valid_rows(mask_ptr, i, n, HAS_MASK)[:, None] & valid[None, :]
            if DEBIASED:
                included = included & (i[:, None] != row[None, :])
            offsets = i[:, None] * ROWS + row[None, :]
            kx = _centered_rows(part_ptr, offsets, included, inverse_x, sums_x, count, DEBIASED)
            ky = _centered_rows(
                part_ptr + SIZE, offsets, included, inverse_y, sums_y, count, DEBIASED
            )
            square_x += inner_product(kx, kx)
            square_y += inner_product(ky, ky)
            product += inner_product(kx, ky)
            if STORE:
                out = grams_ptr + i[:, None] * stride + row[None, :]
                inside = (i < edge)[:, None] & (row < edge)[None, :]
                tl.store(out, kx, mask=inside)
                tl.store(out + plane, ky, mask=inside)
        peak_x = tl.max(diagonal_x, 0) * inverse_x * inverse_x
        peak_y = tl.max(diagonal_y, 0) * inverse_y * inverse_y
        sums = pack_sums(square_x, square_y, product, peak_x, peak_y)
        gram_cka_head(
            values_ptr + entry, saved_ptr + entry * SCALARS, sums, count.to(tl.float64),
            pivot_x, pivot_y, inverse_x, inverse_y, DEBIASED, DISTANCE,
        )  # fmt: skip


def rows_of(layers: Layers) -> int:
    """Rows that kernels for few rows are compiled for: two sizes, those of configurations."""
    return 64 if layers.max_rows <= 64 else SMALL_GRAM_ROWS


def launch(
    layers: Layers,
    config: Config,
    values: Tensor,
    saved: Saved,
    *,
    debiased: bool,
    distance: bool,
    store: bool,
) -> None:
    """Values, and what the backward needs, from up to SMALL_GRAM_ROWS rows of features."""
    programs = triton.next_power_of_2(-(-layers.widest // config.small_share))
    share = round_up(-(-layers.widest // programs), config.small_k)
    rows = rows_of(layers)
    workspace = layers.empty(layers.entries * programs * (2 * rows * rows + 4))
    # New counters, for the price of a small launch. Counters that outlive a call would be needed
    # once a stream, and inside CUDA graphs nobody would own them.
    counters = None
    if programs > 1:
        counters = torch.zeros(layers.entries, dtype=torch.int32, device=layers.device)
    gram_cka_small_kernel[(programs, layers.entries)](
        *layers.arguments, workspace, counters, values, saved.grams, stride_of(layers), share,
        **layers.feature_options, DEBIASED=debiased, DISTANCE=distance, STORE=store,
        ROWS=rows, BLOCK_K=config.small_k, PROGRAMS=programs,
        num_warps=8 if rows > 64 else 4, num_stages=2,
    )  # fmt: skip
