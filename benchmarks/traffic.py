"""What a batch over many GPUs should cost: bytes and time of both ways, for docs/distributed.md.

Bytes are those that ``rift_kernels.dispatch.shared_batch`` chooses by. Time is a model, not a
measurement: a message takes its bytes at the rate of the slowest link that it crosses, and a
latency for each of the hops that follow one another; computing takes the products at the machine's
rate. Every rank computes all of the gathered batch.
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
    moving: float  # seconds
    computing: float

    def __str__(self) -> str:
        return f"{_time(self.moving)} + {_time(self.computing)}"


def cost(shape: Shape, ranks: int, way: str) -> Cost:
    """The cost of one loss of bfloat16 features, ``rows`` of them on each rank."""
    x = torch.empty(shape.rows, shape.width, dtype=torch.bfloat16, device="meta")
    layers, rows, width = Layers([x], [x], []), shape.rows, shape.width
    received: float = shared_batch.bytes_summed(layers, ranks)
    # Rows that stay on their rank are summed in covariance form, however few there are.
    flops = 8.0 * rows * width**2
    if way == "gathered":
        received, rows = shared_batch.bytes_gathered(layers, [[rows]] * ranks), rows * ranks
        gram = plan.use_gram("cka", rows, width, width)
        flops = 4.0 * rows * rows * width if gram else 8.0 * rows * width * width
    rate = FAST if ranks <= NODE else SLOW
    hops = 2 * (ranks - 1).bit_length()  # of a tree over the ranks, there and back
    return Cost(received, received / rate + MESSAGES[way] * hops * HOP, flops / FLOPS)


def _time(seconds: float) -> str:
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


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
            gathered, summed = costs = [cost(shape, ranks, way) for way in MESSAGES]
            taken = summed if gathered.bytes > summed.bytes else gathered
            cells = [str(shape) if ranks == RANKS[0] else "", str(ranks)]
            for way in costs:
                bold = "**" if way is taken else ""
                cells += [f"{bold}{_size(way.bytes)}{bold}", str(way)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
