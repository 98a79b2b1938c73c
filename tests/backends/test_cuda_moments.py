"""CUDA kernels for second moments, executed on a CPU: the schedule of tiles, and the products."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rift_kernels.backends import cuda
from tests.support import cases

BLOCK, CHUNK = 128, 64
# As in csrc/cka_large/schedule.h.
PIECE_COST = 4


class Moments:
    """A launch on some features, and its results."""

    def __init__(self, x: Tensor, y: Tensor, processors: int, hopper: bool) -> None:
        self.x, self.y, self.machine = x, y, (processors, hopper)
        schedule = cuda.extension().moments_schedule(*x.shape, y.shape[1], *self.machine)
        self.schedule, self._before = schedule, -(-x.shape[1] // BLOCK)
        # The part of each tile that begins with the first rows; all others, by square and part.
        self.tiles = torch.empty(schedule.tiles, BLOCK, BLOCK, device=x.device)
        side = schedule.square_side
        squares = schedule.spill_floats // (side * BLOCK) ** 2
        self.spill = torch.empty(squares, side, side, BLOCK, BLOCK, device=x.device)

    def __call__(self, stream: int) -> None:
        sides = [(t.data_ptr(), t.stride(0), t.shape[1]) for t in (self.x, self.y)]
        addresses = self.tiles.data_ptr(), self.spill.data_ptr()
        place = cuda._device(self.x), stream
        cuda.extension().moments(*sides, self.x.shape[0], *self.machine, *addresses, *place)

    def totals(self) -> Tensor:
        """Tiles of the last launch, all parts added up: (slot, row, column)."""
        schedule, tiles = self.schedule, self.tiles.clone()
        for slot in range(schedule.tiles):
            tile = schedule.tile(slot)
            # Places among the blocks of all columns, those of X before those of Y.
            i, j = tile.i + tile.left_is_y * self._before, tile.j + tile.right_is_y * self._before
            square = _pair_index(i // schedule.square_side, j // schedule.square_side)
            for part in range(1, schedule.parts(square)):
                within = i % schedule.square_side, j % schedule.square_side
                tiles[slot] += self.spill[schedule.spill_index(square, part)][within]
        return tiles

    def cross(self) -> Tensor:
        """X^T Y, as the last launch computed it."""
        down, across = self._before, -(-self.y.shape[1] // BLOCK)
        totals = self.totals()
        slots = [[_pair_index(i, down + j) for j in range(across)] for i in range(down)]
        whole = torch.cat([torch.cat([totals[slot] for slot in row], 1) for row in slots])
        return whole[: self.x.shape[1], : self.y.shape[1]]


def _pair_index(i: int, j: int) -> int:
    return j * (j + 1) // 2 + i


@pytest.fixture(autouse=True)
def _first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors have no device index: pretend device 0 of the emulator's two."""
    monkeypatch.setattr(cuda, "_device", lambda _: 0)


def pieces(schedule) -> list[tuple[int, int, int, int, int]]:
    """All pieces of work: program, square, part, first chunk, and the end of its chunks."""
    all_pieces = []
    for program in range(schedule.programs):
        for index in itertools.count():
            square, part, begin, end = schedule.piece(program, index)
            if begin == end:
                break
            all_pieces.append((program, square, part, begin, end))
    return all_pieces


SCHEDULES = {
    "rows": st.integers(1, 5000),
    "width_x": st.integers(1, 900),
    "width_y": st.integers(1, 900),
    "processors": st.integers(1, 300),
    "hopper": st.booleans(),
}


@settings(deadline=None)
@given(**SCHEDULES)
def test_every_square_and_chunk_is_covered_once(
    emulated_extension, rows, width_x, width_y, processors, hopper
):
    """By consecutive parts, no two of which share a place in spill memory."""
    schedule = emulated_extension.moments_schedule(rows, width_x, width_y, processors, hopper)
    parts = collections.defaultdict(dict)
    for _, square, part, begin, end in pieces(schedule):
        assert 0 <= begin < end <= schedule.chunks
        assert part not in parts[square]
        parts[square][part] = begin, end
    assert set(parts) == set(range(schedule.squares))
    places = set()
    for square, chunks_of_parts in parts.items():
        assert sorted(chunks_of_parts) == list(range(schedule.parts(square)))
        ordered = [chunks_of_parts[part] for part in sorted(chunks_of_parts)]
        assert ordered[0][0] == 0
        assert ordered[-1][1] == schedule.chunks == -(-rows // CHUNK)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ordered))
        for part in range(1, len(ordered)):
            place = schedule.spill_index(square, part)
            assert 0 <= place < schedule.spill_floats // (schedule.square_side * BLOCK) ** 2
            assert place not in places
            places.add(place)


@settings(deadline=None)
@given(**SCHEDULES)
def test_work_is_shared_evenly(emulated_extension, rows, width_x, width_y, processors, hopper):
    """No program has more than its share, but for what shorter pieces would have cost in all."""
    schedule = emulated_extension.moments_schedule(rows, width_x, width_y, processors, hopper)
    chunks = collections.Counter()
    for program, _, _, begin, end in pieces(schedule):
        chunks[program] += end - begin
    share = -(-schedule.squares * schedule.chunks // schedule.programs)
    whole_squares, shared_squares = divmod(schedule.squares, schedule.programs)
    limit = share
    if shared_squares:
        even = -(-shared_squares * schedule.chunks // schedule.programs)
        segments = schedule.programs // shared_squares
        tail = schedule.chunks - segments * even
        uneven = -(-schedule.chunks // segments)
        limit = whole_squares * schedule.chunks + min(
            uneven, even + (PIECE_COST * (even // tail + 1) if tail > 0 else uneven)
        )
    assert max(chunks.values()) <= limit
    if hopper and processors == 132 and rows > 2000 and shared_squares:
        assert max(chunks.values()) <= 1.25 * share + 8


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(12608, 768), (50432, 1024), (65536, 4096)], ids=str)
def test_few_products_are_superfluous(emulated_extension, rows, width, hopper):
    """Those below the diagonal of tiles on it, at sizes that tiles divide."""
    schedule = emulated_extension.moments_schedule(rows, width, width, 132, hopper)
    # Of a square of 2 x 2 tiles on the diagonal, moments_sm90 computes three.
    on_diagonal = {_pair_index(i, i) for i in range(schedule.squares)}
    tiles = sum(
        (end - begin) * (schedule.square_side**2 - (hopper and square in on_diagonal))
        for _, square, _, begin, end in pieces(schedule)
    )
    needed = rows * width * (2 * width + 1)
    assert needed <= tiles * CHUNK * BLOCK**2 <= 1.1 * needed


@given(width_x=st.integers(1, 3000), width_y=st.integers(1, 3000))
def test_tiles_are_those_on_and_above_the_diagonal(emulated_extension, width_x, width_y):
    schedule = emulated_extension.moments_schedule(1, width_x, width_y, 1, False)
    blocks_x, blocks_y = -(-width_x // BLOCK), -(-width_y // BLOCK)
    expected = {(False, i, False, j) for j in range(blocks_x) for i in range(j + 1)}
    expected |= {(True, i, True, j) for j in range(blocks_y) for i in range(j + 1)}
    expected |= {(False, i, True, j) for j in range(blocks_y) for i in range(blocks_x)}
    tiles = [schedule.tile(slot) for slot in range(schedule.tiles)]
    assert {(t.left_is_y, t.i, t.right_is_y, t.j) for t in tiles} == expected
    assert len(tiles) == len(expected)


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(
    ("rows", "width_x", "width_y", "processors"),
    # One program for all squares, several for one, odd numbers of blocks, shared tails.
    [
        (150, 128, 128, 1),
        (130, 8, 200, 8),
        (300, 136, 72, 3),
        (70, 264, 136, 7),
        (1530, 136, 24, 10),
    ],
    ids=str,
)
def test_moments(
    emulated_extension, monkeypatch, rows, width_x, width_y, processors, hopper
) -> None:
    """The parts of every tile, added up in order, make X^T X, Y^T Y and X^T Y."""
    monkeypatch.setattr(cuda, "extension", lambda: emulated_extension)
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(rows, width, generator=generator).bfloat16() for width in (width_x, width_y)
    )
    # Rows with a gap between them.
    y = torch.cat([y, torch.full_like(y, float("nan"))], 1)[:, :width_y]
    launch = Moments(x, y, processors, hopper)
    launch.tiles.fill_(float("nan"))
    launch.spill.fill_(float("nan"))
    launch(0)
    padded = [
        torch.nn.functional.pad(t.float(), (0, -t.shape[1] % BLOCK)).split(BLOCK, 1) for t in (x, y)
    ]
    for slot, total in enumerate(launch.totals()):
        tile = launch.schedule.tile(slot)
        expected = padded[tile.left_is_y][tile.i].T @ padded[tile.right_is_y][tile.j]
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 3e-6), (3.0, 1e-5)])
def test_long_sums(emulated_extension, monkeypatch, mean, tolerance, hopper) -> None:
    """Truncation errors grow with the accumulator, and with the mean that is subtracted later."""
    monkeypatch.setattr(cuda, "extension", lambda: emulated_extension)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4096, 8, generator=generator, dtype=torch.float64) + mean).bfloat16()
    launch = Moments(x, x, 2, hopper)
    launch(0)
    exact = x.double()
    means = exact.mean(0)
    expected = (exact - means).T @ (exact - means)
    actual = launch.cross().double() - 4096 * means[:, None] * means
    assert cases.relative_error(actual, expected) <= tolerance


def test_the_benchmark_adds_up_the_parts(emulated_extension, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "extension", lambda: emulated_extension)
    x, y = torch.randn(2, 200, 136).bfloat16()
    launch = Moments(x, y, 5, True)
    launch(0)
    torch.testing.assert_close(launch.cross(), x.float().T @ y.float(), rtol=1e-5, atol=1e-4)


def test_wrong_arguments(emulated_extension) -> None:
    for text, x, tiles in (
        (
            "x must have rows that do not overlap; got 24 columns with a stride of 8",
            (32, 8, 24),
            16,
        ),
        ("x must have rows that do not overlap; got 8 columns with a stride of 0", (32, 0, 8), 16),
        ("x must have rows at multiples of 16 bytes; got 32 with a stride of 9", (32, 9, 8), 16),
        ("x must have rows at multiples of 16 bytes; got 36", (36, 8, 8), 16),
        ("tiles must be an address; got 0", (32, 8, 8), 0),
        ("width_x must be 1 to", (32, 8, 0), 16),
    ):
        with pytest.raises(ValueError, match=text):
            emulated_extension.moments(x, (32, 8, 8), 4, 1, True, tiles, 16, 0, 0)
