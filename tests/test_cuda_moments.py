"""The Hopper kernels of large N on a CPU: who multiplies what, and the products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import moments
from rift_kernels.backends import cuda

BLOCK, CHUNK = 128, 64


def pieces(schedule) -> list[tuple[int, int, int, int]]:
    """(program, slot, first, last) of everything that is done."""
    found = []
    for program in range(schedule.programs):
        at = schedule.begin(program)
        while at < schedule.begin(program + 1):
            slot, first, last = schedule.piece(program, at)
            assert at == slot * schedule.chunks + first
            assert last > first
            found.append((program, slot, first, last))
            at += last - first
    return found


@settings(deadline=None)
@given(
    rows=st.integers(1, 2000),
    width_x=st.integers(1, 700),
    width_y=st.integers(1, 700),
    programs=st.integers(1, 300),
)
def test_every_tile_and_chunk_is_covered_once(emulated_extension, rows, width_x, width_y, programs):
    schedule = emulated_extension.moments_schedule(rows, width_x, width_y, programs)
    covered = set()
    begun_within = set()
    for program, slot, first, last in pieces(schedule):
        assert 0 <= slot < schedule.tiles
        assert last <= schedule.chunks
        for chunk in range(first, last):
            assert (slot, chunk) not in covered
            covered.add((slot, chunk))
        if first > 0:
            # One spill a program.
            assert program not in begun_within
            begun_within.add(program)
    assert len(covered) == schedule.tiles * schedule.chunks
    assert schedule.chunks == -(-rows // CHUNK)


@given(width_x=st.integers(1, 3000), width_y=st.integers(1, 3000))
def test_tiles_are_those_on_and_above_the_diagonal(emulated_extension, width_x, width_y):
    schedule = emulated_extension.moments_schedule(1, width_x, width_y, 1)
    blocks_x, blocks_y = -(-width_x // BLOCK), -(-width_y // BLOCK)
    expected = {(False, i, False, j) for j in range(blocks_x) for i in range(j + 1)}
    expected |= {(True, i, True, j) for j in range(blocks_y) for i in range(j + 1)}
    expected |= {(False, i, True, j) for j in range(blocks_y) for i in range(blocks_x)}
    tiles = [schedule.tile(slot) for slot in range(schedule.tiles)]
    assert {(t.left_is_y, t.i, t.right_is_y, t.j) for t in tiles} == expected
    assert len(tiles) == len(expected)


@pytest.mark.parametrize(
    ("rows", "width_x", "width_y", "programs"),
    [(150, 128, 128, 1), (64, 8, 200, 2), (300, 136, 72, 4), (70, 264, 136, 7)],
    ids=str,
)
def test_moments(emulated_extension, rows, width_x, width_y, programs) -> None:
    """The parts of every tile, added up in order, are X^T X, Y^T Y and X^T Y."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(rows, width, generator=generator).bfloat16() for width in (width_x, width_y)
    )
    # Rows that do not follow one another.
    y = torch.cat([y, torch.full_like(y, float("nan"))], 1)[:, :width_y]
    schedule = emulated_extension.moments_schedule(rows, width_x, width_y, programs)
    tiles = torch.full((schedule.tiles, BLOCK, BLOCK), float("nan"))
    spill = torch.full((programs, BLOCK, BLOCK), float("nan"))
    sides = [(t.data_ptr(), t.stride(0), t.shape[1]) for t in (x, y)]
    emulated_extension.moments_sm90(*sides, rows, programs, tiles.data_ptr(), spill.data_ptr(), 0)
    totals = tiles.clone()
    for program, slot, first, _ in pieces(schedule):
        if first > 0:
            totals[slot] += spill[program]
    padded = [
        torch.nn.functional.pad(t.float(), (0, -t.shape[1] % BLOCK)).split(BLOCK, 1) for t in (x, y)
    ]
    for slot in range(schedule.tiles):
        tile = schedule.tile(slot)
        expected = padded[tile.left_is_y][tile.i].T @ padded[tile.right_is_y][tile.j]
        torch.testing.assert_close(totals[slot], expected, rtol=1e-5, atol=1e-4)


def test_the_benchmark_adds_up_the_parts(emulated_extension, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "extension", lambda: emulated_extension)
    x, y = torch.randn(2, 200, 136).bfloat16()
    launch = moments.Moments(x, y, 3)
    launch(0)
    torch.testing.assert_close(launch.cross(), x.float().T @ y.float(), rtol=1e-5, atol=1e-4)


def test_wrong_arguments(emulated_extension) -> None:
    for text, x, tiles in (
        ("x must have rows at multiples of 16 bytes; got 32 with a stride of 9", (32, 9, 8), 16),
        ("x must have rows at multiples of 16 bytes; got 36", (36, 8, 8), 16),
        ("tiles must be an address; got 0", (32, 8, 8), 0),
        ("width_x must be 1 to", (32, 8, 0), 16),
    ):
        with pytest.raises(ValueError, match=text):
            emulated_extension.moments_sm90(x, (32, 8, 8), 4, 1, tiles, 16, 0)
