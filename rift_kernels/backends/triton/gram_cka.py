"""Linear CKA in Gram form, for more than 128 rows: values and centered K, from raw moments.

    biased      K = X X^T, centered on both sides: ``K - s_i - s_j``, s from the row sums
    debiased    U-centered: the same without the diagonal, which becomes 0 (Szekely & Rizzo 2014)

Bytes: the partial tiles once, both K in float32 once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    COUNT,
    ENERGY_X,
    ENERGY_Y,
    PIVOT_X,
    PIVOT_Y,
    STATISTICS,
    column_mean,
    inverse_scale,
    statistic,
)
from .config import Config
from .device import arrive, batch_of, layer_of, mask_of, over_programs, size, valid_rows
from .gram_cka_head import (
    FIELDS,
    PEAK_X,
    PEAK_Y,
    center_offset,
    gram_cka_head,
    inner_product,
    pack_sums,
)
from .gram_saved import SCALARS, Saved, edge_of, grams_of, stride_of
from .layers import Layers
from .raw_moments import RawMoments
from .tiles import shared_of, spills_of, sum_partials, triangle, triangle_index


@triton.jit
def _row_sums(
    sums_ptr, first_slot, block, blocks, within, shared, share, length, slots, BLOCK: tl.constexpr
):
    """Row sums of some rows of K, over the tiles of their block's row and column."""
    total = tl.zeros(within.shape, tl.float32)
    for other in range(blocks):
        pair = triangle_index(tl.minimum(block, other), tl.maximum(block, other))
        side = tl.where(other < block, BLOCK, 0)
        slot = first_slot + pair
        total += tl.load(sums_ptr + slot * (2 * BLOCK) + side + within)
        first, last = spills_of(slot, shared, share, length)
        for program in range(first, last):
            total += tl.load(sums_ptr + (slots + program) * (2 * BLOCK) + side + within)
    return total


@triton.jit
def _total(totals_ptr, first_slot, tiles, shared, share, length, slots, spills, all_tiles):
    """The sum of all elements of K."""
    lanes = tl.arange(0, 256)
    total = tl.zeros([256], tl.float64)
    for start in range(0, tiles, 256):
        slot = first_slot + start + lanes
        total += tl.load(totals_ptr + slot, mask=start + lanes < tiles, other=0.0)
    for start in range(0, spills, 256):
        program = start + lanes
        begin = program * share
        slot = shared + begin // length
        mask = (slot >= first_slot) & (slot < first_slot + tiles) & (slot < all_tiles)
        # A program left a spill where it began in the middle of a tile.
        mask = mask & (begin % length != 0)
        total += tl.load(totals_ptr + slots + program, mask=mask, other=0.0)
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def _centered_tile(
    tiles_ptr, row_sums_ptr, totals_ptr, first_slot, pair, block_i, block_j,
    within_i, within_j, offsets, diagonal, included, n, scale, blocks, tiles, shared, share, length,
    slots, spills, DEBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of one side's K, centered and scaled, and its largest element on the diagonal."""
    k = sum_partials(
        tiles_ptr, first_slot + pair, slots, shared, share, length, offsets, BLOCK * BLOCK
    )
    total = _total(totals_ptr, first_slot, tiles, shared, share, length, slots, spills, 2 * tiles)
    sums_i = _row_sums(
        row_sums_ptr, first_slot, block_i, blocks, within_i, shared, share, length, slots, BLOCK
    )
    sums_j = _row_sums(
        row_sums_ptr, first_slot, block_j, blocks, within_j, shared, share, length, slots, BLOCK
    )
    peak = tl.max(tl.max(tl.where(diagonal, k, 0.0), 1), 0) * scale
    k = k - center_offset(sums_i, total, n, DEBIASED)[:, None]
    k = k - center_offset(sums_j, total, n, DEBIASED)[None, :]
    return tl.where(included, k * scale, 0.0), peak


@triton.jit(
    do_not_specialize=[
        *("stride_mb", "column_programs", "segments", "slots", "spills"),
    ]
)
def gram_cka_kernel(
    masks, rows, stride_mb,
    tiles_ptr, row_sums_ptr, sums_ptr, statistics_ptr, counters_ptr,
    values_ptr, saved_ptr, means_ptr, partial_ptr,
    tile_programs, shares, lengths, column_programs, segments, width, slots, spills, stride,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr,
    DEBIASED: tl.constexpr, DISTANCE: tl.constexpr, STORE: tl.constexpr,
    BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One program owns SUB rows of one tile of both Kx and Ky."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    programs = tl.num_programs(0)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n = size(rows, layer)
    SIZE: tl.constexpr = BLOCK * BLOCK
    PARTS: tl.constexpr = BLOCK // SUB
    statistics_ptr += entry * STATISTICS * column_programs
    tiles_ptr += entry.to(tl.int64) * (slots + spills) * SIZE
    row_sums_ptr += entry.to(tl.int64) * (slots + spills) * (2 * BLOCK + 1)
    totals_ptr = row_sums_ptr + (slots + spills) * (2 * BLOCK)
    partial_ptr += entry.to(tl.int64) * programs * FIELDS
    mask_ptr = mask_of(masks, stride_mb, layer, batch, statistics_ptr, HAS_MASK)
    count = statistic(statistics_ptr, COUNT, column_programs)
    inverse_x = inverse_scale(statistics_ptr, PIVOT_X, ENERGY_X, column_programs)
    inverse_y = inverse_scale(statistics_ptr, PIVOT_Y, ENERGY_Y, column_programs)
    n_float = count.to(tl.float32)
    blocks = tl.cdiv(n, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    shared, share, length = shared_of(2 * tiles, tile_programs, shares, lengths, layer)
    if STORE:
        # The backward reads means.
        for block in range(program, width // BLOCK, programs):
            column = block * BLOCK + tl.arange(0, BLOCK)
            for side in tl.static_range(2):
                first = (entry * 2 + side).to(tl.int64) * width
                own_sums = sums_ptr + first * segments
                everywhere = column < width
                mean = column_mean(own_sums, column, segments, width, n_float, everywhere, BLOCK)
                tl.store(means_ptr + first + column, mean)
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
        included = inside
        if DEBIASED:
            included = inside & (i[:, None] != j[None, :])
        plane = stride.to(tl.int64) * stride
        grams_ptr = grams_of(saved_ptr, entry, plane)
        direct = i.to(tl.int64)[:, None] * stride + j[None, :]
        mirrored = j.to(tl.int64)[None, :] * stride + i[:, None]
        edge = edge_of(n)
        bounds = (i < edge)[:, None] & (j < edge)[None, :]
        scale_x, scale_y = inverse_x * inverse_x, inverse_y * inverse_y
        kx, peak_x = _centered_tile(
            tiles_ptr, row_sums_ptr, totals_ptr, 0, pair, block_i, block_j,
            within_i, within_j, offsets, inside & diagonal, included, n_float, scale_x,
            blocks, tiles, shared, share, length, slots, spills, DEBIASED, BLOCK,
        )  # fmt: skip
        ky, peak_y = _centered_tile(
            tiles_ptr, row_sums_ptr, totals_ptr, tiles, pair, block_i, block_j,
            within_i, within_j, offsets, inside & diagonal, included, n_float, scale_y,
            blocks, tiles, shared, share, length, slots, spills, DEBIASED, BLOCK,
        )  # fmt: skip
        if STORE:
            tl.store(grams_ptr + direct, kx, mask=bounds)
            tl.store(grams_ptr + plane + direct, ky, mask=bounds)
            if block_i != block_j:
                tl.store(grams_ptr + mirrored, kx, mask=bounds)
                tl.store(grams_ptr + plane + mirrored, ky, mask=bounds)
        twice = tl.where(block_i == block_j, 1.0, 2.0)
        sums = pack_sums(
            twice * inner_product(kx, kx),
            twice * inner_product(ky, ky),
            twice * inner_product(kx, ky),
            peak_x,
            peak_y,
        )
    field = tl.arange(0, FIELDS)
    tl.store(partial_ptr + program * FIELDS + field, sums)
    if arrive(counters_ptr + entry, programs):
        tl.debug_barrier()
        total, peak = over_programs(partial_ptr, programs, FIELDS)
        total = tl.where((field == PEAK_X) | (field == PEAK_Y), peak, total)
        pivot_x = statistic(statistics_ptr, PIVOT_X, column_programs)
        pivot_y = statistic(statistics_ptr, PIVOT_Y, column_programs)
        gram_cka_head(
            values_ptr + entry, saved_ptr + entry * SCALARS, total, count, pivot_x, pivot_y,
            inverse_x, inverse_y, DEBIASED, DISTANCE,
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
    store: bool,
) -> None:
    """Values, and what the backward needs, from raw moments."""
    programs = moments.slots // 2 * (config.block // config.sub)
    partial = layers.empty(layers.entries * programs * FIELDS.value, dtype=torch.float64)
    gram_cka_kernel[(programs, layers.entries)](
        layers.mask_addresses, layers.row_counts, layers.stride_mb, *moments.tensors,
        values, saved.grams, saved.means, partial,
        *moments.deal, moments.column_programs, moments.segments, moments.width,
        moments.slots, moments.spills, stride_of(layers),
        **layers.options, DEBIASED=debiased, DISTANCE=distance, STORE=store,
        BLOCK=config.block, SUB=config.sub, num_warps=config.head_warps,
    )  # fmt: skip
