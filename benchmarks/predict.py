"""``python -m benchmarks.predict``: what the Triton kernels should take on an H200, by launch.

Written before they have run on one. A launch takes the longer of its floating point operations at
the machine's rate and its bytes at the machine's bandwidth, and a gap before the next; nothing is
assumed to be lost, so this is a floor, and its share of a target is how good the kernels have to
be. The two parts of the first launch follow one another. Both rates were measured on such a
machine.

The table stands in docs/kernels.md. This command also writes the tables of what the kernels compile
to, of how they were executed, and of :mod:`benchmarks.traffic`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from . import environment, executed, resources, traffic
from .files import RESULTS
from .report import updated

DOCS = environment.ROOT / "docs"
KERNELS, DISTRIBUTED, STATUS = "kernels.md", "distributed.md", "status.md"
COMPILED = RESULTS / "triton-resources.json"
COMPILED_CUDA = RESULTS / "cuda-resources.json"
EXECUTED = RESULTS / "executed.json"
MACHINE = "H200"
FLOPS, BYTES, L2_BYTES = 790e12, 4.3e12, 50e6
GAP = 1e-6
BLOCK = 128


class Launch(NamedTuple):
    kernel: str
    flops: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self.flops / FLOPS, self.bytes / BYTES) + GAP


class Shape(NamedTuple):
    rows: int
    width: int
    layers: int
    target: float | None

    def __str__(self) -> str:
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        return f"{layers}{self.rows} x {self.width}"


SHAPES = (
    Shape(64, 768, 1, None),
    Shape(256, 768, 12, None),
    Shape(12608, 768, 1, 95e-6),
    Shape(50432, 1024, 1, 680e-6),
    Shape(65536, 4096, 1, 13.5e-3),
)


def launches(shape: Shape) -> list[Launch]:
    """Forward and student gradient of biased linear CKA, bfloat16, student near its teacher."""
    n, d, layers = shape.rows, shape.width, shape.layers
    features = 2 * n * d * layers
    if n <= 128:
        gram = 4 * n * n * layers
        return [
            # Features are split in two: each side has three products.
            Launch("small_gram", 3 * 2 * 2 * n * n * d * layers, 2 * features + 2 * gram),
            Launch("gram_backward", 2 * 2 * n * n * d * layers, 2 * features + 2 * gram),
        ]
    # Column programs read everything once, before the tile programs. Where it fits, it is in the
    # cache for those.
    columns = Launch("moments, columns", 0, 2 * features)
    again = 0 if 2 * features < L2_BYTES else 2 * features
    if n < 2 * d:
        blocks = -(-n // BLOCK)
        tiles = blocks * (blocks + 1) * layers
        partial, gram = 4 * tiles * BLOCK**2, 4 * n * n * layers
        return [
            columns,
            Launch("moments, tiles", 2 * tiles * BLOCK**2 * d, again + partial),
            Launch("gram", 0, partial + 2 * gram),
            Launch("gram_backward", 2 * 2 * n * n * d * layers, 2 * features + 2 * gram),
        ]
    blocks = -(-d // BLOCK)
    tiles = blocks * (2 * blocks + 1) * layers
    partial, planes = 4 * tiles * BLOCK**2, 2 * 2 * 2 * (blocks * BLOCK) ** 2 * layers
    return [
        columns,
        Launch("moments, tiles", 2 * tiles * BLOCK**2 * n, again + partial),
        Launch("cka", 0, partial + 4 * blocks**2 * BLOCK**2 * layers + planes),
        # Near its teacher, only the high halves count.
        Launch("backward", 4 * n * d * d * layers, 3 * features + planes / 2),
    ]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def table() -> str:
    lines = [
        f"Floors of forward and student gradient on an {MACHINE} at {FLOPS / 1e12:.0f} TFLOP/s and "
        f"{BYTES / 1e12:.1f} TB/s, {GAP * 1e6:.0f} us a launch; bfloat16, biased linear CKA, "
        "student near its teacher. Not measured.",
        "",
        "| features | launch | GFLOP | MB | floor | sum | target | target allows |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        parts = launches(shape)
        total = sum(part.seconds for part in parts)
        for i, part in enumerate(parts):
            ends = ["", "", ""]
            if i == len(parts) - 1:
                share = f"{total / shape.target:.0%} of the floor's rate" if shape.target else "-"
                ends = [_time(total), _time(shape.target) if shape.target else "-", share]
            numbers = [f"{part.flops / 1e9:.3g}", f"{part.bytes / 1e6:.3g}", _time(part.seconds)]
            cells = [str(shape) if i == 0 else "", part.kernel, *numbers, *ends]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables that nothing is measured for.")
    parser.add_argument("--check", action="store_true", help="only say whether they are there")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    options = parser.parse_args(arguments)
    sections = (
        (KERNELS, "predicted", table()),
        (KERNELS, "resources", resources.section(COMPILED)),
        (KERNELS, "cuda-resources", resources.cuda_section(COMPILED_CUDA)),
        (DISTRIBUTED, "traffic", traffic.table()),
        (STATUS, "executed", executed.section(EXECUTED)),
    )
    paths = {page: options.docs / page for page, _, _ in sections}
    before = {page: path.read_text(encoding="utf-8") for page, path in paths.items()}
    after = dict(before)
    for page, name, text in sections:
        after[page] = updated(after[page], name, text)
    changed = [page for page in paths if before[page] != after[page]]
    if options.check:
        for page in changed:
            print(f"{page} differs from what python -m benchmarks.predict writes")
        return int(bool(changed))
    for page in changed:
        paths[page].write_text(after[page], encoding="utf-8")
        print(f"wrote {paths[page]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
