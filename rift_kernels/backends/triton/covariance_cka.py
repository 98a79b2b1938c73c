"""Linear CKA in covariance form: values and the backward's operands, from raw moments.

Features are scaled to unit norm. With ``A = X^T X``, ``C = X^T Y``, ``B = Y^T Y`` and
``value = h / sqrt(hxx hyy)`` (covariance_cka_head.py), the student's gradient is

    beta (X (-u A) + Y C^T),    u = h / hxx,  beta = 2 / sqrt(hxx hyy)

Its terms nearly cancel where the student is near its teacher. A number t, the regression of Y on X,
rearranges it:

    F = C^T - t A               formed here, in float32
    W = t Y - u X               formed in the backward, in float32
    gradient = beta (W A + Y F)

Every term is then as small as the gradient itself, so that bfloat16 operands suffice, and there are
no more products than before. The exception is ``||F||^2`` large beside ``(1 - value) ||C||^2``,
where the student is a rotation of its teacher. There the low halves of W, A and F are multiplied as
well. No kernel waits for that decision: A and F are stored in halves, and the backward forms W and
chooses the products.

Bytes: every partial tile once for A, B and C each, and once more per F; A and F as two bfloat16
numbers each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    COUNT,
    ENERGY_X,
    ENERGY_XY,
    ENERGY_Y,
    PIVOT_X,
    PIVOT_Y,
    STATISTICS,
    column_mean,
    inverse_scale,
    statistic,
)
from .config import Config
from .covariance_cka_head import (
    FIELDS,
    ROUNDING,
    ROUNDING_OF_SPLIT,
    ROW_FIELDS,
    SQUARE_A,
    SQUARE_B,
    SQUARE_C,
    SQUARE_FX,
    SQUARE_FY,
    covariance_cka_head,
)
from .covariance_saved import SCALARS, Saved, energy_programs, store_halves, store_shift
from .device import (
    LONG_COUNT,
    LONG_FIELDS,
    LONGEST,
    arrive,
    batch_of,
    features_of,
    layer_of,
    mask_of,
    over_programs,
    size,
    square_sum,
)
from .layers import Layers
from .raw_moments import RawMoments
from .row_terms import GROUP, WORKSPACE, sums_of_rows
from .tiles import shared_of, sum_partials, tile_of, triangle_index


@triton.jit
def _own_rows(
    tiles_ptr, slot, slots, shared, share, length, part, lower, BLOCK: tl.constexpr,
    SUB: tl.constexpr,
):  # fmt: skip
    """SUB rows of a tile of A or B, which is the transpose of a stored one below the diagonal."""
    SIZE: tl.constexpr = BLOCK * BLOCK
    short = part * SUB + tl.arange(0, SUB)
    long = tl.arange(0, BLOCK)
    if lower:
        # Read in the order of memory, because a sector holds several columns.
        columns = long[:, None] * BLOCK + short[None, :]
        rows = tl.trans(sum_partials(tiles_ptr, slot, slots, shared, share, length, columns, SIZE))
    else:
        offsets = short[:, None] * BLOCK + long[None, :]
        rows = sum_partials(tiles_ptr, slot, slots, shared, share, length, offsets, SIZE)
    return rows


@triton.jit(
    do_not_specialize=[
        *("stride_xb", "stride_yb", "stride_mb"),
        *("column_programs", "segments", "slots", "spills"),
        *("max_rows", "row_groups", "group_size"),
    ]
)
def covariance_cka_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb,
    longest_ptr, tiles_ptr, sums_ptr, statistics_ptr, counters_ptr,
    values_ptr, scalars_ptr, planes_x_ptr, planes_y_ptr, shift_x_ptr, shift_y_ptr,
    means_ptr, row_sums_ptr, products_ptr, weighted_ptr, workspace_ptr, row_partial_ptr,
    partial_ptr,
    tile_programs, shares, lengths,
    column_programs, segments, width, slots, spills, max_rows, row_groups,
    group_size,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    SPLIT: tl.constexpr, NEAR: tl.constexpr, SHIFT: tl.constexpr,
    DEBIASED: tl.constexpr, DISTANCE: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, LOW_HALVES: tl.constexpr,
    BLOCK: tl.constexpr, SUB: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program owns SUB rows of one tile of A, B or C, or a run of feature rows."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    programs = tl.num_programs(0)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n, d1, d2 = size(rows, layer), size(widths_x, layer, VECTOR), size(widths_y, layer, VECTOR)
    SIZE: tl.constexpr = BLOCK * BLOCK
    PARTS: tl.constexpr = BLOCK // SUB
    sums_x = sums_ptr + entry.to(tl.int64) * (2 * segments * width)
    sums_y = sums_x + segments * width
    statistics_ptr += entry * STATISTICS * column_programs
    tiles_ptr += entry.to(tl.int64) * (slots + spills) * SIZE
    scalars_ptr += entry * 2 * SCALARS
    row_programs = row_groups * group_size
    partial_ptr += entry.to(tl.int64) * (programs - row_programs) * FIELDS
    row_partial_ptr += entry.to(tl.int64) * row_programs * ROW_FIELDS
    count = statistic(statistics_ptr, COUNT, column_programs)
    inverse_x = inverse_scale(statistics_ptr, PIVOT_X, ENERGY_X, column_programs)
    inverse_y = inverse_scale(statistics_ptr, PIVOT_Y, ENERGY_Y, column_programs)
    t_x, t_y = inverse_x * 0.0, inverse_y * 0.0
    if NEAR:
        # With features of unit norm, both regressions have the same coefficient.
        energy_xy = statistic(statistics_ptr, ENERGY_XY, column_programs)
        t_x = (energy_xy * inverse_x * inverse_y).to(tl.float32)
        t_y = t_x
    n_float = count.to(tl.float32)
    long_count = n * 0
    if DEBIASED:
        longest_ptr += entry * LONG_FIELDS
        long_count = tl.load(longest_ptr + LONG_COUNT)

    blocks_x, blocks_y = tl.cdiv(d1, BLOCK), tl.cdiv(d2, BLOCK)
    count_x = blocks_x * (blocks_x + 1) // 2
    tiles = count_x + blocks_y * (blocks_y + 1) // 2 + blocks_x * blocks_y
    shared, share, length = shared_of(tiles, tile_programs, shares, lengths, layer)
    field = tl.arange(0, FIELDS)
    sums = tl.zeros([FIELDS], tl.float64)
    within_i = tl.arange(0, SUB)
    within_j = tl.arange(0, BLOCK)
    plane = (2 * width).to(tl.int64) * width
    planes_x_ptr += entry * 2 * plane
    planes_y_ptr += entry * 2 * plane
    half = (width // BLOCK) * PARTS * width
    shift_x_ptr += entry.to(tl.int64) * 2 * half
    shift_y_ptr += entry.to(tl.int64) * 2 * half
    # Row programs come first, because they take longest.
    if program < row_programs:
        if DEBIASED:
            x_ptr, stride_xn, stride_xd = features_of(
                xs, strides_xn, strides_xd, stride_xb, layer, batch, DTYPE, VECTOR
            )
            y_ptr, stride_yn, stride_yd = features_of(
                ys, strides_yn, strides_yd, stride_yb, layer, batch, DTYPE, VECTOR
            )
            mask_ptr = mask_of(masks, stride_mb, layer, batch, x_ptr, HAS_MASK)
            k_ptr = row_sums_ptr + entry.to(tl.int64) * 2 * max_rows
            with_x = products_ptr + entry.to(tl.int64) * 2 * max_rows * LONGEST
            row_sums = sums_of_rows(
                x_ptr, y_ptr, stride_xn, stride_xd, stride_yn, stride_yd, mask_ptr, n, d1, d2,
                longest_ptr, long_count, sums_x, sums_y, segments, width, n_float,
                inverse_x, inverse_y, k_ptr, k_ptr + max_rows,
                with_x, with_x + max_rows.to(tl.int64) * LONGEST,
                workspace_ptr + entry.to(tl.int64) * row_programs * WORKSPACE * width,
                weighted_ptr + entry.to(tl.int64) * row_groups * 4 * width,
                program, row_groups, group_size,
                STUDENT, TEACHER, HAS_MASK, VECTOR, BLOCK, BLOCK_R,
            )  # fmt: skip
            out = row_partial_ptr + program * ROW_FIELDS + tl.arange(0, ROW_FIELDS)
            tl.store(out, row_sums)
    else:
        index = program - row_programs
        slot, part = index // PARTS, index % PARTS
        if slot < tiles:
            left_is_y, block_i, right_is_y, block_j = tile_of(slot, blocks_x, blocks_y, True, True)
            offsets = (part * SUB + within_i)[:, None] * BLOCK + within_j[None, :]
            i = block_i * BLOCK + part * SUB + within_i
            j = block_j * BLOCK + within_j
            tile = sum_partials(tiles_ptr, slot, slots, shared, share, length, offsets, SIZE)
            sums_i = tl.where(left_is_y, sums_y, sums_x)
            sums_j = tl.where(right_is_y, sums_y, sums_x)
            mean_i = column_mean(sums_i, i, segments, width, n_float, i < width, SUB)
            mean_j = column_mean(sums_j, j, segments, width, n_float, j < width, BLOCK)
            if not SPLIT:
                tile -= (n_float * mean_i)[:, None] * mean_j[None, :]
            scale_i = tl.where(left_is_y, inverse_y, inverse_x)
            scale_j = tl.where(right_is_y, inverse_y, inverse_x)
            tile = tile * scale_i * scale_j
            i64, j64 = i.to(tl.int64), j.to(tl.int64)
            # A thread that stored more columns would load float32 tiles half a sector at a time.
            direct = tl.max_contiguous(i64[:, None] * width + j64[None, :], [1, 4])
            mirrored = j64[None, :] * width + i64[:, None]
            square = square_sum(tile)
            if left_is_y == right_is_y:
                if block_i == block_j:
                    side = tl.where(left_is_y, width, 0)
                    tl.store(means_ptr + entry * 2 * width + side + i, mean_i)
                square *= tl.where(block_i == block_j, 1.0, 2.0)
                if left_is_y:
                    sums = tl.where(field == SQUARE_B, square, sums)
                    if TEACHER:
                        store_halves(planes_y_ptr, plane, direct, tile)
                        if block_i != block_j:
                            store_halves(planes_y_ptr, plane, mirrored, tile)
                else:
                    sums = tl.where(field == SQUARE_A, square, sums)
                    if STUDENT:
                        store_halves(planes_x_ptr, plane, direct, tile)
                        if block_i != block_j:
                            store_halves(planes_x_ptr, plane, mirrored, tile)
            else:
                sums = tl.where(field == SQUARE_C, square, sums)
                lower = block_i > block_j
                pair = triangle_index(tl.minimum(block_i, block_j), tl.maximum(block_i, block_j))
                if STUDENT:
                    # The transpose of F is C - t A.
                    remainder = tile
                    if NEAR:
                        own = _own_rows(
                            tiles_ptr, pair, slots, shared, share, length, part, lower, BLOCK, SUB
                        )
                        if not SPLIT:
                            mean = column_mean(
                                sums_x, j, segments, width, n_float, j < width, BLOCK
                            )
                            own -= (n_float * mean_i)[:, None] * mean[None, :]
                        remainder = tile - t_x * (own * inverse_x * inverse_x)
                    sums = tl.where(field == SQUARE_FX, square_sum(remainder), sums)
                    store_halves(
                        planes_x_ptr + width.to(tl.int64) * width, plane, mirrored, remainder
                    )
                    if SHIFT:
                        store_shift(shift_x_ptr, half, block_j * width + i, mean_j, remainder, 1)
                if TEACHER:
                    remainder = tile
                    if NEAR:
                        own = _own_rows(
                            tiles_ptr, count_x + pair, slots, shared, share, length, part, lower,
                            BLOCK, SUB,
                        )  # fmt: skip
                        if not SPLIT:
                            mean = column_mean(sums_y, i, segments, width, n_float, i < width, SUB)
                            own -= (n_float * mean)[:, None] * mean_j[None, :]
                        remainder = tile - t_y * (own * inverse_y * inverse_y)
                    sums = tl.where(field == SQUARE_FY, square_sum(remainder), sums)
                    store_halves(
                        planes_y_ptr + width.to(tl.int64) * width, plane, direct, remainder
                    )
                    if SHIFT:
                        row = block_i * PARTS + part
                        store_shift(shift_y_ptr, half, row * width + j, mean_i, remainder, 0)
        tl.store(partial_ptr + index * FIELDS + field, sums)
    if arrive(counters_ptr + entry, programs):
        tl.debug_barrier()
        total, _ = over_programs(partial_ptr, programs - row_programs, FIELDS)
        row_total, _ = over_programs(row_partial_ptr, row_programs, ROW_FIELDS)
        pivot_x = statistic(statistics_ptr, PIVOT_X, column_programs)
        pivot_y = statistic(statistics_ptr, PIVOT_Y, column_programs)
        # Squared norms of both means, for long rows alone.
        mean_x, mean_y = count * 0, count * 0
        for first in range(0, tl.where(long_count > 0, width, 0), BLOCK):
            column = entry * 2 * width + first + within_j
            x = tl.load(means_ptr + column).to(tl.float64) * inverse_x
            y = tl.load(means_ptr + column + width).to(tl.float64) * inverse_y
            mean_x += tl.sum(x * x, 0)
            mean_y += tl.sum(y * y, 0)
        rounding = count * 0 + ROUNDING
        if SPLIT:
            narrow = tl.minimum(d1, d2).to(tl.float64)
            rounding = tl.maximum(rounding, (count * 0 + ROUNDING_OF_SPLIT) / narrow)
        covariance_cka_head(
            values_ptr + entry, scalars_ptr, total, row_total, count + long_count, long_count,
            pivot_x, pivot_y, mean_x, mean_y, inverse_x, inverse_y, t_x, t_y, rounding,
            DEBIASED, DISTANCE, LOW_HALVES,
        )  # fmt: skip


def launch(
    layers: Layers,
    config: Config,
    moments: RawMoments,
    values: Tensor,
    saved: Saved,
    *,
    debiased: bool,
    distance: bool,
    student: bool,
    teacher: bool,
    low_halves: bool,
) -> None:
    """Values, and what the backward needs, from raw moments."""
    row_groups = energy_programs(layers, debiased)
    # Layers share the processors, and a program has at least one block of rows.
    group_size = -(-layers.max_rows // (config.block_r * max(row_groups, 1)))
    group_size = max(1, min(group_size, GROUP.value // layers.entries))
    row_programs = row_groups * group_size
    tile_programs = moments.slots * (config.block // config.sub)
    entries, float64 = layers.entries, torch.float64
    covariance_cka_kernel[(row_programs + tile_programs, entries)](
        *layers.arguments, saved.longest if debiased else None,
        moments.tiles, moments.sums, moments.statistics, moments.counters,
        values, *saved[:-1],
        layers.empty(entries * row_programs * WORKSPACE.value * moments.width),
        layers.empty(entries * row_programs * ROW_FIELDS.value, dtype=float64),
        layers.empty(entries * tile_programs * FIELDS.value, dtype=float64),
        *moments.deal, moments.column_programs, moments.segments, moments.width,
        moments.slots, moments.spills, layers.max_rows, row_groups,
        group_size,
        **layers.feature_options,
        SPLIT=layers.is_split, NEAR=layers.x.widths == layers.y.widths,
        SHIFT=not layers.is_split, DEBIASED=debiased, DISTANCE=distance,
        STUDENT=student, TEACHER=teacher, LOW_HALVES=low_halves,
        BLOCK=config.block, SUB=config.sub, BLOCK_R=config.block_r,
        num_warps=config.head_warps,
    )  # fmt: skip
