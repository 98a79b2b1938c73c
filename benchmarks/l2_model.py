"""``python -m benchmarks.l2_model``: what the tile programs of raw_moments read from memory.

A model, not a measurement. The L2 cache keeps what was read last. Programs start in their order, as
many at once as there are processors, and each multiplies one chunk of rows in the same time. What
they read follows from the functions that the kernel itself calls. Column programs, which come
first, are left out, and so is what is written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from rift_kernels.backends.triton import tiles

# An H200, and what configs.json has for it.
PROCESSORS, L2_BYTES, BLOCK, BLOCK_K = 132, 50e6, 128, 64
# Bytes of one operand of one step: bfloat16.
READ = 2 * BLOCK * BLOCK_K
# Rows, width, layers.
SHAPES = ((12608, 768, 1), (50432, 1024, 1), (65536, 4096, 1), (16384, 4096, 1), (12608, 768, 12))

Operand = tuple[int, int, int]  # layer, block of columns of [X | Y], chunk of rows


class Launch(NamedTuple):
    """Equal layers in one launch."""

    tiles: list[tuple[int, int]]  # blocks of columns, by slot
    chunks: int
    layers: int
    deal: tiles.Deal

    @property
    def even(self) -> float:
        """Steps, if no processor were ever idle."""
        return self.layers * len(self.tiles) * self.chunks / PROCESSORS

    @property
    def parts(self) -> int:
        """Partial tiles that programs leave."""
        count, programs = len(self.tiles), self.deal.programs
        parts = [pieces(count, self.chunks, self.deal, program) for program in range(programs)]
        return self.layers * sum(map(len, parts))


def launch(rows: int, width: int, layers: int) -> Launch:
    """The covariance form of bfloat16 features, both sides equally wide."""
    side, chunks = -(-width // BLOCK), -(-rows // BLOCK_K)
    upper = [(i, j) for j in range(side) for i in range(j + 1)]
    slots = [*upper, *((side + i, side + j) for i, j in upper)]
    slots += [(i, side + j) for i in range(side) for j in range(side)]
    counts = [len(slots)] * layers
    return Launch(
        slots, chunks, layers, tiles.deals(counts, [chunks] * layers, layers, PROCESSORS)[0]
    )


def pieces(count: int, chunks: int, deal: tiles.Deal, program: int) -> list[tuple[int, int, int]]:
    """What a program does, by turn: a tile's slot, the first chunk, the one behind the last."""
    work = tiles.work_of.fn(program, count, chunks, *deal)
    return [
        tiles.piece_of.fn(turn, program, deal.programs, chunks, *work) for turn in range(work[0])
    ]


def _reads(launch: Launch, layer: int, program: int) -> Iterator[list[Operand]]:
    """What a program reads, step by step."""
    for slot, first, last in pieces(len(launch.tiles), launch.chunks, launch.deal, program):
        for chunk in range(first, last):
            yield [(layer, block, chunk) for block in launch.tiles[slot]]


def run(launch: Launch, cached: float = L2_BYTES) -> tuple[int, int]:
    """Bytes from memory, and the steps that the launch takes."""
    cache: OrderedDict[Operand, None] = OrderedDict()
    missed = steps = 0
    waiting = (
        _reads(launch, layer, program)
        for layer in range(launch.layers)
        for program in range(launch.deal.programs)
    )
    running = list(islice(waiting, PROCESSORS))
    while running:
        still = []
        for reads in running:
            operands = next(reads, None)
            if operands is None:
                reads = next(waiting, iter(()))
                operands = next(reads, None)
            if operands is None:
                continue
            still.append(reads)
            for operand in operands:
                missed += operand not in cache
                cache[operand] = None
                cache.move_to_end(operand)
                if len(cache) * READ > cached:
                    cache.popitem(last=False)
        running = still
        steps += bool(still)
    return missed * READ, steps


def main() -> None:
    for rows, width, layers in SHAPES:
        shape = launch(rows, width, layers)
        size, steps = run(shape)
        print(
            f"{layers} of {rows} x {width}: features {4e-9 * rows * width * layers:.3g} GB, read "
            f"{size / 1e9:.3g} GB; {shape.parts} parts of {layers * len(shape.tiles)} tiles; "
            f"{1 - shape.even / steps:.1%} idle"
        )


if __name__ == "__main__":
    main()
