"""How tile programs share tiles: plain arithmetic, which the kernels and a model of the L2 cache
have in common."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

pytest.importorskip("triton", reason="needs triton")

from benchmarks import l2_model
from rift_kernels.backends.triton import tiles
from rift_kernels.backends.triton.tiles import Deal

Piece = tuple[int, int, int]


def pieces(count: int, chunks: int, deal: Deal) -> list[list[Piece]]:
    """What each program does, and that programs beyond the last one do nothing."""
    assert not l2_model.pieces(count, chunks, deal, deal.programs)
    return [l2_model.pieces(count, chunks, deal, program) for program in range(deal.programs)]


def check(count: int, chunks: int, deal: Deal) -> None:
    """All chunks of all tiles once, and every part where the next launch looks for it."""
    parts: dict[int, list[tuple[int, int, int]]] = {slot: [] for slot in range(count)}
    for program, own in enumerate(pieces(count, chunks, deal)):
        # A program has one spill.
        assert sum(first > 0 for _, first, _ in own) <= 1
        for slot, first, last in own:
            assert last > first
            parts[slot].append((first, last, program))
    shared = count // deal.programs * deal.programs
    for slot, own in parts.items():
        own.sort()
        assert own[0][0] == 0
        assert own[-1][1] == chunks
        assert all(left[1] == right[0] for left, right in pairwise(own))
        first, last = tiles.spills_of.fn(slot, shared, deal.share, deal.length)
        assert [program for *_, program in own[1:]] == list(range(first, last))


def test_every_chunk_once() -> None:
    draw = random.Random(0)
    for _ in range(500):
        count, chunks = draw.randint(1, 200), draw.randint(1, 300)
        check(count, chunks, tiles.deal(count, chunks, draw.randint(1, 148)))


@pytest.mark.parametrize("entries", [1, 5])
def test_layers_share_evenly(entries: int) -> None:
    """Every program of a launch has as much to do, whatever the sizes of layers."""
    counts, chunks = [78, 20, 136, 78, 3][:entries], [197, 788, 50, 33, 788][:entries]
    deals = tiles.deals(counts, chunks, entries, 132)
    work = []
    for count, depth, deal in zip(counts, chunks, deals, strict=True):
        check(count, depth, deal)
        work += [sum(last - first for _, first, last in own) for own in pieces(count, depth, deal)]
    assert max(work) <= 1.1 * sum(work) / len(work)
    assert len(work) % 132 in (0, *range(132 - entries, 132))


def test_pieces_of_limited_length() -> None:
    """Where registers cannot hold a sum of runs."""
    for count, chunks in ((3, 1000), (136, 788), (300, 40)):
        (deal,) = tiles.deals([count], [chunks], 1, 132, most=32)
        check(count, chunks, deal)
        assert max(b - a for own in pieces(count, chunks, deal) for _, a, b in own) <= 32


@pytest.mark.parametrize("shape", [s for s in l2_model.SHAPES if s[0] * s[1] < 6e7], ids=str)
def test_programs_are_busy_and_read_the_same_rows(shape) -> None:
    """Where memory is slower than the products, features come from memory about once."""
    rows, width, layers = shape
    launch = l2_model.launch(*shape)
    size, steps = l2_model.run(launch)
    assert 1 - launch.even / steps <= 0.05
    # Tiles of wide layers do not all run at once.
    waves = max(1, len(launch.tiles) // l2_model.PROCESSORS)
    assert size <= 1.5 * waves * 4 * rows * width * layers
    assert launch.parts <= layers * (len(launch.tiles) + l2_model.PROCESSORS)
