"""Tiles of symmetric matrices: their positions, how programs share them, and their totals.

Device functions that take numbers alone are Python functions, too, as their attribute ``fn``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from .device import size

# How unevenly programs may share the tiles that are left, if that leaves fewer parts of tiles.
UNEVEN = 1 / 64
MOST_TURNS = 8
# The least part of its work that a program has in shared tiles, if layers may run side by side.
LEAST_SHARED = 1 / 8


class Deal(NamedTuple):
    """How programs share the (tile, chunk) pairs of a layer."""

    programs: int
    share: int  # chunks of shared tiles that a program takes
    length: int  # of a shared tile, at least its chunks


@lru_cache(maxsize=1024)
def deal(tiles: int, chunks: int, programs: int) -> Deal:
    """Every program gets equally many whole tiles. The tiles that are left are shared.

    Shared tiles are cut into segments, the same for all, so that few programs walk other rows than
    the rest. A program takes consecutive segments, of two tiles at most.
    """
    programs = max(1, min(programs, tiles * chunks))
    whole, shared = divmod(tiles, programs)
    best = Deal(programs, chunks, chunks)
    bound = (tiles * chunks / programs) * (1 + UNEVEN) - whole * chunks
    for turns in range(1, MOST_TURNS + 1):
        if not shared or best.share <= bound:
            break
        step = -(-chunks // min(turns * programs // shared, chunks))
        segments = -(-chunks // step)
        share = -(-shared * segments // programs) * step
        if share < best.share:
            best = Deal(programs, share, segments * step)
        if step == 1:
            break
    return best


def deals(
    tiles: Sequence[int],
    chunks: Sequence[int],
    entries: int,
    processors: int,
    most: int | None = None,
) -> list[Deal]:
    """A launch's layers, or the one whose ``entries`` are a batch.

    All programs of a launch have about the same work. Programs that run at once belong to as few
    layers as possible, whose rows then stay in the L2 cache; but each has a whole tile and part of
    a shared one, because more programs would leave more parts. ``most``: chunks of one piece.
    """
    pairs = [count * depth for count, depth in zip(tiles, chunks, strict=True)]
    times = entries // len(tiles)
    rounds = int(sum(tiles) * times / ((1 + LEAST_SHARED) * processors))
    available = max(1, min(rounds, entries)) * processors
    total = sum(pairs) * times
    result = []
    for count, depth, pair in zip(tiles, chunks, pairs, strict=True):
        least = count * -(-depth // most) if most else 1
        result.append(deal(count, depth, max(least, available * pair // total)))
    return result


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
def work_of(program, tiles, chunks, programs, share, length):
    """What a program works on, see :func:`deal`: its turns, a tile each; how many of these have
    whole tiles; the last of its shared tiles, where that begins in the first and ends in the last.
    """
    whole = tiles // programs
    begin = program * share
    end = min(begin + share, tiles % programs * length)
    tile = (end - 1) // length
    turns = whole
    if program >= programs:
        turns *= 0
    if begin < end:
        turns += tile - begin // length + 1
    return turns, whole, whole * programs + tile, begin % length, min(end - tile * length, chunks)


@triton.jit
def piece_of(turn, program, programs, chunks, turns, whole, slot, start, stop):
    """What a program does at its ``turn``: a tile's slot, the first chunk, the one behind the last.

    All programs walk the same rows of whole tiles together. So do those that begin a shared tile,
    because each takes the tile that it begins before the one that it ends.
    """
    first = turn * 0
    last = first + chunks
    if turn >= whole:
        slot -= turn - whole
        if turn == turns - 1:
            first = start
        if turn == whole:
            last = stop
    else:
        slot = turn * programs + program
    return slot, first, last


@triton.jit
def shared_of(tiles, tile_programs, shares, lengths, layer):
    """The first shared tile of a layer, and how it is shared: fields of its :class:`Deal`."""
    programs = size(tile_programs, layer)
    return tiles // programs * programs, size(shares, layer), size(lengths, layer)


@triton.jit
def spills_of(slot, shared, share, length):
    """The first program that leaves part of a tile in its spill, and the one behind the last."""
    begin = (slot - shared) * length
    first = begin // share + 1
    last = (begin + length - 1) // share + 1
    if slot < shared:
        last = first
    return first, last


@triton.jit
def sum_partials(
    tiles_ptr, slot, slots, shared, share, length, offsets, SIZE: tl.constexpr
):  # fmt: skip
    """A tile's total over the programs that worked on it, in the order of their chunks.

    The program that begins a tile leaves its sum in the tile's slot. One that begins in the middle
    of a tile leaves it in its own spill, behind all slots.
    """
    total = tl.load(tiles_ptr + slot.to(tl.int64) * SIZE + offsets)
    first, last = spills_of(slot, shared, share, length)
    for program in range(first, last):
        total += tl.load(tiles_ptr + (slots + program).to(tl.int64) * SIZE + offsets)
    return total
