"""Covariance distance to a teacher batch: values and ``A - B``, from raw moments.

    value  = ||A - B||^2 / unit^2 + mean_weight ||mean_x - mean_y||^2
    grad_X = (4 / unit^2) Xc (A - B) + (2 mean_weight / n) (mean_x - mean_y)
    grad_Y = (-4 / unit^2) Yc (A - B [+ value B]) + (2 mean_weight / n) (mean_y - mean_x)

with ``A = Xc^T Xc`` and ``B = Yc^T Yc``. The unit is ``||B||`` (relative), ``2 D (n-1)`` (CORAL) or
``n - 1``. The term in brackets belongs to the relative distance, whose unit is the teacher's.
Nothing needs ``Xc^T Yc``, so it is not computed.

Bytes: the partial tiles of A and B once; ``A - B`` (and B) as two bfloat16 numbers each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import COUNT, PIVOT_X, PIVOT_Y, STATISTICS, column_mean, statistic
from .config import Config
from .covariance_saved import SCALARS, Saved, store_halves, store_shift, store_side
from .device import arrive, layer_of, over_programs, size, square_sum
from .layers import Layers
from .raw_moments import RawMoments
from .tiles import shared_of, sum_partials, triangle

SQUARE_DIFFERENCE = tl.constexpr(0)
SQUARE_B = tl.constexpr(1)
SQUARE_MEANS = tl.constexpr(2)
FIELDS = tl.constexpr(4)

KINDS = {"relative": 0, "coral": 1, "none": 2}


@triton.jit
def _field(sums, field):
    return tl.sum(tl.where(tl.arange(0, FIELDS) == field, sums, 0.0), 0)


@triton.jit
def _head(
    value_ptr, scalars_ptr, sums, n, width, mean_weight, pivot_x, pivot_y, KIND: tl.constexpr
):
    """Store a layer's value and scalars, computed in float64."""
    unit = n - 1
    if KIND == 0:
        square_b = tl.where(pivot_y == 0, 0.0, _field(sums, SQUARE_B))
        outer = tl.where(square_b == 0, 0.0, 1 / tl.where(square_b == 0, 1.0, square_b))
    else:
        if KIND == 1:
            unit = unit * 2 * width
        outer = 1 / (unit * unit)
    value = _field(sums, SQUARE_DIFFERENCE) * outer
    # NaN and Inf in features reach the value even where the teacher does not vary.
    value += (pivot_x - pivot_x) + (pivot_y - pivot_y)
    value = tl.where(n < 2, float("nan"), value)
    tl.store(value_ptr, (value + mean_weight * _field(sums, SQUARE_MEANS)).to(tl.float32))
    scale = 4 * outer
    one, zero, poison = n * 0 + 1, n * 0, value - value
    # Features that do not vary are exactly 0 when centered, however their mean is rounded.
    scale_x = tl.where(pivot_x == 0, 0.0, scale) + poison
    scale_y = tl.where(pivot_y == 0, 0.0, -scale) + poison
    # The teacher's two terms partly cancel, so that their low halves matter.
    low_halves = one if KIND == 0 else zero
    bias = 2 * mean_weight / n
    store_side(scalars_ptr, 0, n, scale_x, zero, zero, zero, bias, zero, zero, one, one)
    store_side(scalars_ptr, 1, n, scale_y, value, zero, low_halves, bias, zero, zero, one, one)


@triton.jit
def _store_matrix(planes_ptr, plane, first, width, i, j, mirrored, tile):
    """Store a tile of a symmetric matrix, on both sides of the diagonal."""
    i64, j64 = i.to(tl.int64), j.to(tl.int64)
    store_halves(planes_ptr, plane, (first + i64[:, None]) * width + j64[None, :], tile)
    if mirrored:
        store_halves(planes_ptr, plane, (first + j64[None, :]) * width + i64[:, None], tile)


@triton.jit
def _store_shifts(
    shift_ptr, half, width, block_i, block_j, part, i, j, mean_i, mean_j, tile,
    PARTS: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Store what means of rows i add to columns j and, mirrored, those of rows j to columns i."""
    row = block_i * PARTS + part
    store_shift(shift_ptr, half, row * width + j, mean_i, tile, 0)
    if block_i != block_j:
        store_shift(shift_ptr, half, block_j * PARTS * width + i, mean_j, tile, 1)
        for other in range(1, PARTS):
            # The first sum covers the whole block, so those of other parts are 0.
            offsets = (block_j * PARTS + other) * width + i
            tl.store(shift_ptr + offsets, tl.zeros([SUB], tl.float32))
            tl.store(shift_ptr + half + offsets, tl.zeros([SUB], tl.float32))


@triton.jit(do_not_specialize=["column_programs", "segments", "slots", "spills"])
def covariance_distance_kernel(
    widths, tiles_ptr, sums_ptr, statistics_ptr, counters_ptr,
    values_ptr, scalars_ptr, planes_x_ptr, planes_y_ptr, shift_x_ptr, shift_y_ptr, means_ptr,
    partial_ptr,
    mean_weight, tile_programs, shares, lengths, column_programs, segments, width, slots, spills,
    LAYERS: tl.constexpr, SPLIT: tl.constexpr, SHIFT: tl.constexpr,
    KIND: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One program owns SUB rows of one tile of A - B on or above the diagonal."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    programs = tl.num_programs(0)
    layer = layer_of(entry, LAYERS)
    d = size(widths, layer)
    SIZE: tl.constexpr = BLOCK * BLOCK
    PARTS: tl.constexpr = BLOCK // SUB
    sums_x = sums_ptr + entry.to(tl.int64) * (2 * segments * width)
    sums_y = sums_x + segments * width
    statistics_ptr += entry * STATISTICS * column_programs
    tiles_ptr += entry.to(tl.int64) * (slots + spills) * SIZE
    partial_ptr += entry.to(tl.int64) * programs * FIELDS
    plane = width.to(tl.int64) * width
    planes_x_ptr += entry * 2 * plane
    # If the teacher has two matrices, B is above.
    MATRICES: tl.constexpr = 2 if KIND == 0 else 1
    planes_y_ptr += entry * 2 * MATRICES * plane
    half = (width // BLOCK) * PARTS * width
    shift_x_ptr += entry.to(tl.int64) * 2 * half
    shift_y_ptr += entry.to(tl.int64) * 2 * half
    count = statistic(statistics_ptr, COUNT, column_programs)
    n_float = count.to(tl.float32)
    blocks = tl.cdiv(d, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    shared, share, length = shared_of(2 * tiles, tile_programs, shares, lengths, layer)
    field = tl.arange(0, FIELDS)
    sums = tl.zeros([FIELDS], tl.float64)
    slot, part = program // PARTS, program % PARTS
    if slot < tiles:
        block_i, block_j = triangle(slot)
        within_i = part * SUB + tl.arange(0, SUB)
        within_j = tl.arange(0, BLOCK)
        offsets = within_i[:, None] * BLOCK + within_j[None, :]
        i, j = block_i * BLOCK + within_i, block_j * BLOCK + within_j
        a = sum_partials(tiles_ptr, slot, slots, shared, share, length, offsets, SIZE)
        b = sum_partials(tiles_ptr, tiles + slot, slots, shared, share, length, offsets, SIZE)
        x_i = column_mean(sums_x, i, segments, width, n_float, i < width, SUB)
        y_i = column_mean(sums_y, i, segments, width, n_float, i < width, SUB)
        x_j = column_mean(sums_x, j, segments, width, n_float, j < width, BLOCK)
        y_j = column_mean(sums_y, j, segments, width, n_float, j < width, BLOCK)
        if not SPLIT:
            a -= (n_float * x_i)[:, None] * x_j[None, :]
            b -= (n_float * y_i)[:, None] * y_j[None, :]
        difference = a - b
        twice = tl.where(block_i == block_j, 1.0, 2.0)
        sums = tl.where(field == SQUARE_DIFFERENCE, twice * square_sum(difference), sums)
        sums = tl.where(field == SQUARE_B, twice * square_sum(b), sums)
        if block_i == block_j:
            tl.store(means_ptr + entry * 2 * width + i, x_i)
            tl.store(means_ptr + (entry * 2 + 1) * width + i, y_i)
            mean_difference = (x_i - y_i).to(tl.float64)
            sums = tl.where(
                field == SQUARE_MEANS, tl.sum(mean_difference * mean_difference, 0), sums
            )
        mirrored = block_i != block_j
        if STUDENT:
            _store_matrix(planes_x_ptr, plane, 0, width, i, j, mirrored, difference)
            if SHIFT:
                _store_shifts(
                    shift_x_ptr, half, width, block_i, block_j, part, i, j, x_i, x_j, difference,
                    PARTS, SUB,
                )  # fmt: skip
        if TEACHER:
            below = (MATRICES - 1) * width
            if MATRICES == 2:
                _store_matrix(planes_y_ptr, 2 * plane, 0, width, i, j, mirrored, b)
            _store_matrix(planes_y_ptr, MATRICES * plane, below, width, i, j, mirrored, difference)
            if SHIFT:
                _store_shifts(
                    shift_y_ptr, half, width, block_i, block_j, part, i, j, y_i, y_j, difference,
                    PARTS, SUB,
                )  # fmt: skip
    tl.store(partial_ptr + program * FIELDS + field, sums)
    if arrive(counters_ptr + entry, programs):
        tl.debug_barrier()
        total, _ = over_programs(partial_ptr, programs, FIELDS)
        pivot_x = statistic(statistics_ptr, PIVOT_X, column_programs)
        pivot_y = statistic(statistics_ptr, PIVOT_Y, column_programs)
        _head(
            values_ptr + entry, scalars_ptr + entry * 2 * SCALARS, total, count, d.to(tl.float64),
            mean_weight, pivot_x, pivot_y, KIND,
        )  # fmt: skip


def launch(
    layers: Layers,
    config: Config,
    moments: RawMoments,
    values: Tensor,
    saved: Saved,
    *,
    scale: str,
    mean_weight: float,
    student: bool,
    teacher: bool,
) -> None:
    """Values, and what the backward needs, from raw moments."""
    programs = moments.slots // 2 * (config.block // config.sub)
    partial = layers.empty(layers.entries * programs * FIELDS.value, dtype=torch.float64)
    covariance_distance_kernel[(programs, layers.entries)](
        layers.x.columns, moments.tiles, moments.sums, moments.statistics, moments.counters,
        values, saved.scalars, saved.planes_x, saved.planes_y, saved.shift_x, saved.shift_y,
        saved.means, partial,
        mean_weight, *moments.deal, moments.column_programs, moments.segments,
        moments.width, moments.slots, moments.spills,
        LAYERS=len(layers.rows), SPLIT=layers.is_split,
        SHIFT=not layers.is_split, KIND=KINDS[scale], STUDENT=student, TEACHER=teacher,
        BLOCK=config.block, SUB=config.sub,
        num_warps=config.head_warps,
    )  # fmt: skip
