"""Second moments of many rows on a CPU: the schedule of tiles, and the products."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import moments
from rift_kernels.backends import cuda
from tests.support import cases

BLOCK, CHUNK = 128, 64
# As csrc/cka_large/schedule.h has it.
PIECE_COST = 4


@pytest.fixture(autouse=True)
def _first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors have no device index: pretend device 0 of the emulator's two."""
    monkeypatch.setattr(cuda, "_device", lambda _: 0)


def pieces(schedule) -> list[tuple[int, int, int, int, int]]:
    """(program, square, part, first, last) of everything that is done."""
    found = []
    for program in range(schedule.programs):
        for index in itertools.count():
            square, part, first, last = schedule.piece(program, index)
            if first == last:
                break
            found.append((program, square, part, first, last))
    return found


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
    """By parts in their order, and no two parts in one place."""
    schedule = emulated_extension.moments_schedule(rows, width_x, width_y, processors, hopper)
    parts = collections.defaultdict(dict)
    for _, square, part, first, last in pieces(schedule):
        assert 0 <= first < last <= schedule.chunks
        assert part not in parts[square]
        parts[square][part] = first, last
    assert set(parts) == set(range(schedule.squares))
    places = set()
    for square, found in parts.items():
        assert sorted(found) == list(range(schedule.parts(square)))
        ordered = [found[part] for part in sorted(found)]
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
def test_no_program_has_much_more_to_do_than_its_share(
    emulated_extension, rows, width_x, width_y, processors, hopper
):
    """Whole squares to whole programs cost at most what short pieces would have cost."""
    schedule = emulated_extension.moments_schedule(rows, width_x, width_y, processors, hopper)
    work = collections.Counter()
    for program, _, _, first, last in pieces(schedule):
        work[program] += last - first
    fair = -(-schedule.squares * schedule.chunks // schedule.programs)
    whole, rest = divmod(schedule.squares, schedule.programs)
    allowed = fair
    if rest:
        even = -(-rest * schedule.chunks // schedule.programs)
        segments = schedule.programs // rest
        end = schedule.chunks - segments * even
        uneven = -(-schedule.chunks // segments)
        allowed = whole * schedule.chunks + min(
            uneven, even + (PIECE_COST * (even // end + 1) if end > 0 else uneven)
        )
    assert max(work.values()) <= allowed
    if hopper and processors == 132 and rows > 2000 and rest:
        assert max(work.values()) <= 1.25 * fair + 8


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
    # One cluster for all; several for one square; odd blocks; rows left at their ends.
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
    """The parts of every tile, added up in order, are X^T X, Y^T Y and X^T Y."""
    monkeypatch.setattr(cuda, "extension", lambda: emulated_extension)
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(rows, width, generator=generator).bfloat16() for width in (width_x, width_y)
    )
    # Rows that do not follow one another.
    y = torch.cat([y, torch.full_like(y, float("nan"))], 1)[:, :width_y]
    launch = moments.Moments(x, y, processors, hopper)
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
    """What tensor cores cut off grows with the accumulator, and with the mean that is taken off."""
    monkeypatch.setattr(cuda, "extension", lambda: emulated_extension)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4096, 8, generator=generator, dtype=torch.float64) + mean).bfloat16()
    launch = moments.Moments(x, x, 2, hopper)
    launch(0)
    exact = x.double()
    means = exact.mean(0)
    expected = (exact - means).T @ (exact - means)
    actual = launch.cross().double() - 4096 * means[:, None] * means
    assert cases.relative_error(actual, expected) <= tolerance


def test_the_benchmark_adds_up_the_parts(emulated_extension, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "extension", lambda: emulated_extension)
    x, y = torch.randn(2, 200, 136).bfloat16()
    launch = moments.Moments(x, y, 5, True)
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
