"""``python -m benchmarks.predict``: write the documents' tables that come from no benchmark.

Two models: what kernels should take on an H200, by launch (:mod:`benchmarks.performance`), and what
a batch over many GPUs should cost. The other tables are those of :mod:`benchmarks.kernel_tables`.
``--check`` writes nothing, and exits with 1 where a page differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rift_kernels.dispatch import plan, shared_batch
from rift_kernels.dispatch.checks import Layers

from . import environment, kernel_tables, performance, report
from .files import RESULTS
from .performance import FLOPS, duration
from .tables import markdown

KERNELS, DISTRIBUTED, STATUS = "docs/kernels.md", "docs/distributed.md", "docs/status.md"
COMPILED = RESULTS / "triton-resources.json"
COMPILED_CUDA = RESULTS / "cuda-resources.json"
RANKS = (8, 64, 512, 4096)
NODE = 8  # GPUs that share fast links
# Bytes a second that a GPU receives, within a node and between nodes, and seconds a hop.
FAST, SLOW, HOP = 350e9, 45e9, 4e-6
# Messages one after another, debiased CKA: what the features are like, and the features; or what
# they are like, sums, energies, the longest rows of each, those of all and the others' sums,
# blocks, sums over pairs of rows, and what unequal weights move.
MESSAGES = {"gathered": 2, "summed": 8}
# Rows and width of a rank's features.
FEATURES = {
    "class tokens": (64, 768),
    "tokens of ViT-B": (64 * 197, 768),
    "tokens of a language model": (8192, 4096),
}


class Cost(NamedTuple):
    bytes: float
    moving: float  # seconds
    computing: float


def cost(rows: int, width: int, ranks: int, way: str) -> Cost:
    """The cost of one loss of bfloat16 features, ``rows`` of them on each rank.

    A message takes its bytes at the rate of the slowest link that it crosses, and a latency for
    each of the hops that follow one another. Every rank computes all of the gathered batch.
    """
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    layers = Layers([x], [x], [])
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


def traffic() -> str:
    """A row a shape and number of ranks."""
    rows = []
    for label, (n, d) in FEATURES.items():
        for ranks in RANKS:
            costs = [cost(n, d, ranks, way) for way in MESSAGES]
            least = min(c.bytes for c in costs)
            row = [f"{label}, {n} x {d}" if ranks == RANKS[0] else "", str(ranks)]
            for c in costs:
                size = f"{c.bytes / 1e9:.3g} GB" if c.bytes >= 1e9 else f"{c.bytes / 1e6:.3g} MB"
                row += [f"**{size}**" if c.bytes == least else size]
                row += [f"{duration(c.moving)} + {duration(c.computing)}"]
            rows.append(row)
    header = ["features of a rank", "ranks"]
    header += ["gathered: received", "moving + computing", "summed: received", "moving + computing"]
    return (
        f"A model, not measured: bfloat16, debiased CKA, one layer; {NODE} GPUs a node, "
        f"{FAST / 1e9:.0f} GB/s into a GPU within a node and {SLOW / 1e9:.0f} GB/s between nodes, "
        f"{HOP * 1e6:.0f} us a hop, {FLOPS / 1e12:.0f} TFLOP/s. **Bold** is the way that is taken."
        f"\n\n{markdown(header, rows)}"
    )


def main(arguments: Sequence[str] | None = None, root: Path = environment.ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    check = parser.parse_args(arguments).check
    texts = {
        (KERNELS, "predicted"): performance.predicted(),
        (KERNELS, "counted"): performance.compiled_code(),
        (KERNELS, "resources"): kernel_tables.triton_resources(COMPILED),
        (KERNELS, "cuda-resources"): kernel_tables.cuda_resources(COMPILED_CUDA),
        (DISTRIBUTED, "traffic"): traffic(),
        (STATUS, "executed"): kernel_tables.executed(RESULTS / "executed.json"),
    }
    return int(report.write(texts, root, check) and check)


if __name__ == "__main__":
    sys.exit(main())
