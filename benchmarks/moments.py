"""``python -m benchmarks.moments``: second moments, csrc/cka_large/moments_*, alone.

Checked against products in float32, and timed beside torch.mm on the same features, inputs in turn
so that they come from memory. It says whether the kernels are worth it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rift_kernels.backends import cuda
from rift_kernels.dispatch import availability

SHAPES = ((12608, 768), (50432, 1024), (65536, 4096))
BLOCK = 128
ROUNDS = 10


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


def _seconds(calls: list[Callable[[], object]]) -> float:
    """The time of one call, the inputs in turn."""
    event: type = torch.cuda.Event
    for call in calls:
        call()
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(ROUNDS):
        for call in calls:
            call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / (ROUNDS * len(calls))


def main() -> int:
    if availability.reason_against("cuda") is not None:
        print(f"moments is not done: {availability.reason_against('cuda')}")
        return 0
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    kinds = {"moments_sm80": False}
    if cuda.compiled_for(torch.cuda.get_device_capability(), hopper=True):
        kinds["moments_sm90"] = True
    stream = torch.cuda.current_stream().cuda_stream
    wrong = 0
    for rows, width in SHAPES:
        pairs = [torch.randn(2, rows, width, device="cuda").bfloat16().unbind() for _ in range(3)]
        x, y = pairs[0]
        expected, flops = x.float().T @ y.float(), 2 * rows * width * (2 * width + 1)
        for kind, hopper in kinds.items():
            launches = [Moments(x, y, processors, hopper) for x, y in pairs]
            seconds = _seconds([partial(launch, stream) for launch in launches])
            off = float((launches[0].cross() - expected).norm() / expected.norm())
            wrong += not off < 1e-3
            print(
                f"{rows} x {width}, {kind}: off by {off:.1e}; {seconds * 1e6:.1f} us, "
                f"{flops / seconds / 1e12:.0f} TFLOP/s"
            )
        # It has as many products as the two triangles and X^T Y.
        both = [(x.T, torch.cat([x, y], 1)) for x, y in pairs]
        theirs = _seconds([partial(torch.mm, left, right) for left, right in both])
        print(f"{rows} x {width}, torch.mm of X^T [X Y]: {theirs * 1e6:.1f} us")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
