"""Tiles of symmetric matrices: their positions, and their totals over programs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def triangle(t):
    """Row and column ``i <= j`` of the t-th pair of an upper triangle, column by column."""
    j = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > t, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= t, j + 1, j)
    return t - j * (j + 1) // 2, j


@triton.jit
def triangle_index(i, j):
    """The inverse of :func:`triangle`, for ``i <= j``."""
    return j * (j + 1) // 2 + i


@triton.jit
def tile_of(slot, blocks_x, blocks_y, XX: tl.constexpr, YY: tl.constexpr):
    """A slot's tile: whether its left side is Y, its row, whether its right side is Y, its column.

    Slots hold the upper triangle of XX, the upper triangle of YY, then XY, each only if wanted.
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
def sum_partials(tiles_ptr, spill_ptr, slot, chunks, share, offsets, SIZE: tl.constexpr):
    """A tile's total over the programs that worked on it, in the order of their chunks.

    The program that begins a tile leaves its sum in the tile's slot. One that begins in the middle
    of a tile leaves it in its own spill. Each program has ``share`` (tile, chunk) pairs, each tile
    ``chunks``.
    """
    total = tl.load(tiles_ptr + slot.to(tl.int64) * SIZE + offsets)
    begin = slot * chunks
    for program in range(begin // share + 1, (begin + chunks - 1) // share + 1):
        total += tl.load(spill_ptr + (slot * 0 + program).to(tl.int64) * SIZE + offsets)
    return total
