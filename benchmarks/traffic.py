"""What a batch over many GPUs should cost: bytes and time of both ways, for docs/distributed.md.

Bytes are those that ``rift_kernels.dispatch.shared_batch`` chooses by. Time is a model, not a
measurement: a message takes its bytes at the rate of the slowest link that it crosses, and a
latency for each of the hops that follow one another; computing takes the products at the machine's
rate. Of the gathered batch, every rank computes all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rift_kernels.dispatch import plan, shared_batch
from rift_kernels.dispatch.checks import Layers

RANKS = (8, 64, 512, 4096)
NODE = 8  # GPUs that share fast links
# Bytes a second that a GPU receives, within a node and between nodes, and seconds a hop.
FAST, SLOW, HOP = 350e9, 45e9, 4e-6
FLOPS = 790e12
# Messages one after another, debiased CKA: what the features are like, and the features; or what
# they are like, sums, energies, the longest rows of each, those of all and the others' sums,
# blocks, sums over pairs of rows, and what unequal weights move.
MESSAGES = {"gathered": 2, "summed": 8}


class Shape(NamedTuple):
    what: str
    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.what}, {self.rows} x {self.width}"


SHAPES = (
    Shape("class tokens", 64, 768),
    Shape("tokens of ViT-B", 64 * 197, 768),
    Shape("tokens of a language model", 8192, 4096),
)


class Cost(NamedTuple):
    bytes: float
    moving: float
    computing: float

    @property
    def seconds(self) -> float:
        return self.moving + self.computing


def _hops(ranks: int) -> int:
    """Of a tree over the ranks, there and back."""
    return 2 * (ranks - 1).bit_length()


def _flops(rows: int, width: int) -> float:
    """Of forward and student gradient in the cheaper form."""
    if plan.use_gram("cka", rows, width, width):
        return 4.0 * rows * rows * width
    return 8.0 * rows * width * width


def cost(shape: Shape, ranks: int, way: str) -> Cost:
    """Of one loss of bfloat16 features, ``rows`` of them on each rank."""
    x = torch.empty(shape.rows, shape.width, dtype=torch.bfloat16, device="meta")
    given = Layers([x], [x], [])
    if way == "gathered":
        received: float = shared_batch.bytes_gathered(given, [[shape.rows]] * ranks)
        flops = _flops(shape.rows * ranks, shape.width)
    else:
        received = shared_batch.bytes_summed(given, ranks)
        # Rows that stay where they are are summed in covariance form, however few they are.
        flops = 8.0 * shape.rows * shape.width**2
    rate = FAST if ranks <= NODE else SLOW
    moving = received / rate + MESSAGES[way] * _hops(ranks) * HOP
    return Cost(received, moving, flops / FLOPS)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def table() -> str:
    """The table of docs/distributed.md."""
    lines = [
        f"A model, not measured: bfloat16, debiased CKA, one layer; {NODE} GPUs a node, "
        f"{FAST / 1e9:.0f} GB/s into a GPU within a node and {SLOW / 1e9:.0f} GB/s between nodes, "
        f"{HOP * 1e6:.0f} us a hop, {FLOPS / 1e12:.0f} TFLOP/s. **Bold** is the way that is taken.",
        "",
        "| features of a rank | ranks | gathered: received | moving + computing "
        "| summed: received | moving + computing |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        for ranks in RANKS:
            ways = {way: cost(shape, ranks, way) for way in MESSAGES}
            taken = "summed" if ways["gathered"].bytes > ways["summed"].bytes else "gathered"
            cells = []
            for way, found in ways.items():
                bold = "**" if way == taken else ""
                cells.append(f"{bold}{_size(found.bytes)}{bold}")
                cells.append(f"{_time(found.moving)} + {_time(found.computing)}")
            first = str(shape) if ranks == RANKS[0] else ""
            lines.append(f"| {first} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)
