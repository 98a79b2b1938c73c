"""A performance model of one GPU, fed with what the compiled kernels execute.

``tests/support/counted.py`` records counts for each kernel: products, instructions, sectors and
waves of shared memory. Each unit of a processor takes its counts at its rate. A kernel takes at
least as long as its busiest unit, and no longer than all units one after another, but for what
only a GPU shows: waiting for memory, and clocks that fall under load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from .files import RESULTS
from .tables import markdown

COUNTED = RESULTS / "counted.json"
# Measured on an H200: products of bfloat16 and bytes, a second. Seconds from launch to launch.
FLOPS, BYTES, GAP = 790e12, 4.3e12, 1e-6
PROCESSORS, CLOCK, SCHEDULERS, WAVE = 132, 1.755e9, 4, 128
# Of its L2 cache: what it holds, and what it serves a second. The latter is an assumption: NVIDIA's
# paper on the A100 has 5,120 bytes a clock, and none is published for Hopper.
L2_SIZE, L2_BYTES = 50e6, 5120 * CLOCK
SECTOR = 32
BLOCK = 128
BACKENDS = ("triton", "cuda")
UNITS = ("products", "instructions", "shared memory", "L2 cache", "memory")

Counts = Mapping[str, float]
# Rows, width, layers and the target in seconds.
SHAPES = (
    (64, 768, 1, None),
    (256, 768, 12, None),
    (12608, 768, 1, 95e-6),
    (50432, 1024, 1, 680e-6),
    (65536, 4096, 1, 13.5e-3),
)


class Need(NamedTuple):
    """What the mathematics asks of one launch: multiply-adds, and bytes of memory."""

    products: float
    bytes: float


def needs(backend: str, n: int, d: int, layers: int, debiased: bool) -> dict[str, Need]:
    """By kernel: linear CKA of bfloat16 features near the teacher's, and the student's gradient.

    Symmetric products count half. Features are read again by a launch that comes later, unless all
    of them fit into the L2 cache.
    """
    features, square = 2 * n * d * layers, 4 * n * n * layers
    grams, gradient = n * (n + 1) * d * layers, n * n * d * layers
    again = 0 if 2 * features < L2_SIZE else 2 * features
    if n <= 128:
        # Features are centered and split in two: three products.
        if backend == "cuda":
            return {
                "cka_small": Need(3 * grams + 3 * gradient, 3 * features),
                "scale": Need(0, 2 * features),
            }
        return {
            "gram_cka_small": Need(3 * grams, 2 * features + 2 * square),
            "gram_backward": Need(2 * gradient, 2 * features + 2 * square),
        }
    if n < 2 * d and backend == "triton":
        tiles = -(-n // BLOCK)
        partial = 4 * tiles * (tiles + 1) * BLOCK**2 * layers
        return {
            "raw_moments": Need(grams, 2 * features + partial),
            "gram_cka": Need(0, partial + 2 * square),
            "gram_backward": Need(2 * gradient, 2 * features + 2 * square),
        }
    blocks = -(-d // BLOCK)
    partial = 4 * blocks * (2 * blocks + 1) * BLOCK**2 * layers
    planes = 4 * (blocks * BLOCK) ** 2 * layers  # high halves, the only ones near the teacher
    moments = n * (d * (d + 1) + d * d) * layers
    backward = Need(2 * n * d * d * layers, 3 * features + planes)
    rows = {"longest": Need(0, again)} if debiased else {}
    if backend == "triton":
        # Here, the first launch to read the features brings them into the cache.
        first = {name: Need(0, 2 * features) for name in rows}
        return {
            **first,
            "raw_moments": Need(moments, partial + (again if rows else 2 * features)),
            "covariance_cka": Need(0, partial + 2 * planes + (again if rows else 0)),
            "covariance_backward": backward,
        }
    row_terms = {"row_terms": Need(0, again)} if debiased else {}
    return {
        "statistics": Need(0, 2 * features),
        **rows,
        **row_terms,
        "moments_sm90": Need(moments, partial + again),
        "cka_large_head": Need(0, partial + 2 * planes),
        "backward_sm90": backward,
    }


class Key(NamedTuple):
    """A run in the file of counts."""

    backend: str
    target: str
    rows: int
    width: int
    layers: int
    debiased: bool


@cache
def recorded() -> dict[Key, dict[str, Counts]]:
    """All runs in the file of counts, with the counts of each kernel."""
    content = json.loads(COUNTED.read_text(encoding="utf-8"))
    return {Key(**entry["run"]): entry["kernels"] for entry in content["runs"]}


def counts(backend: str, n: int, d: int, layers: int, debiased: bool) -> dict[str, Counts]:
    """What a run executes on an H200, by kernel.

    A run that is too long for an emulator lies on the line through the two longest of its width.
    """
    wanted = Key(backend, "sm90", n, d, layers, debiased)
    if wanted in recorded():
        return recorded()[wanted]
    shorter, longer = sorted(key for key in recorded() if key == wanted._replace(rows=key.rows))[
        -2:
    ]
    first, second = recorded()[shorter], recorded()[longer]
    step = (n - longer.rows) / (longer.rows - shorter.rows)
    return {
        kernel: {name: count + step * (count - first[kernel][name]) for name, count in last.items()}
        for kernel, last in second.items()
    }


def seconds(counted: Counts, need: Need) -> dict[str, float]:
    """By unit: how long it is busy with a launch."""
    sectors = sum(counted[f"{kind}_sectors"] for kind in ("load", "engine", "store"))
    waves = counted["shared_waves"] + counted["operand_bytes"] / WAVE
    return {
        "products": 2 * counted["products"] / FLOPS,
        "instructions": counted["instructions"] / (SCHEDULERS * PROCESSORS * CLOCK),
        "shared memory": waves / (PROCESSORS * CLOCK),
        "L2 cache": sectors * SECTOR / L2_BYTES,
        "memory": need.bytes / BYTES,
    }


def predicted() -> str:
    """A row a launch, a column a unit: how long it is busy."""
    rows = [
        row
        for n, d, layers, target in SHAPES
        for backend in BACKENDS
        for debiased in (True, False)
        for row in _predicted(backend, n, d, layers, debiased, target)
    ]
    return (
        "Forward and student gradient on an H200, not measured: linear CKA, bfloat16, student near "
        f"its teacher. Counts of compiled kernels, at {FLOPS / 1e12:.0f} TFLOP/s, "
        f"{BYTES / 1e12:.1f} TB/s of memory and {L2_BYTES / 1e12:.1f} of the L2 cache, "
        f"{PROCESSORS} processors at {CLOCK / 1e9:.3f} GHz and {duration(GAP)} a launch. At least: "
        "each launch takes as long as its busiest unit. At most: units take turns."
        f"\n\n{markdown(['features', 'launch', *UNITS, 'at least', 'at most'], rows)}"
    )


def _predicted(
    backend: str, n: int, d: int, layers: int, debiased: bool, target: float | None
) -> list[list[str]]:
    """A row for the sum of all launches; debiased, which is the default, also a row for each."""
    if backend == "cuda" and not cuda_takes(n, d):
        return []
    need = needs(backend, n, d, layers, debiased)
    rows, least, most = [], 0.0, 0.0
    for kernel, counted in counts(backend, n, d, layers, debiased).items():
        units = list(seconds(counted, need[kernel]).values())
        shortest, longest = max(units) + GAP, sum(units) + GAP
        least, most = least + shortest, most + longest
        if debiased:
            rows.append(["", kernel, *map(duration, (*units, shortest, longest))])
    label = f"**{shape(n, d, layers)}, {backend}, {'debiased' if debiased else 'biased'}**"
    aim = f"target {duration(target)}" if target and not debiased else ""
    totals = [f"**{duration(total)}**" for total in (least, most)]
    return [[label, aim, *[""] * len(UNITS), *totals], *rows]


def compiled_code() -> str:
    """A row a kernel: what it executes, beside what is needed."""
    rows = []
    for n, d, layers, _ in SHAPES[:3]:
        for backend in BACKENDS:
            if backend == "cuda" and not cuda_takes(n, d):
                continue
            label = f"{shape(n, d, layers)}, {backend}"
            need = needs(backend, n, d, layers, True)
            for kernel, c in counts(backend, n, d, layers, True).items():
                millions = c["products"] / 1e6
                cells = [
                    f"{c['programs']:.0f}",
                    _ratio(c["products"], need[kernel].products),
                    f"{c['instructions'] / millions:.0f}" if millions else "-",
                    _ratio(c["load_sectors"], c["load_least"]),
                    _ratio(c["store_sectors"], c["store_least"]),
                    _ratio(c["shared_waves"], c["shared_least"]),
                    f"{c['barriers'] / c['warps']:.0f}",
                ]
                rows.append([label, kernel, *cells])
                label = ""
    header = ["features", "kernel", "programs", "products", "instructions", "loads", "stores"]
    # Per million products, the tensor cores of a processor take this many issue slots.
    slots = 1e6 * 2 / FLOPS * PROCESSORS * CLOCK * SCHEDULERS
    return (
        "What compiled kernels execute on sm_90, debiased. Products: multiply-adds on tensor cores "
        "over those needed. Instructions: of warps, for a million products, in whose time a "
        f"processor can issue {slots:.0f}. Loads and stores: sectors of 32 bytes over the least "
        "that the bytes asked for take; below 1 where threads share an address. Shared memory: "
        "waves over the least. Barriers: those that a warp waits at.\n\n"
        f"{markdown([*header, 'shared memory', 'barriers'], rows)}"
    )


def cuda_takes(n: int, d: int) -> bool:
    """Whether there are CUDA kernels for the form that such features take."""
    return n <= 128 or n >= 2 * d


def shape(n: int, d: int, layers: int) -> str:
    return f"{layers} layers of {n} x {d}" if layers > 1 else f"{n} x {d}"


def _ratio(count: float, least: float) -> str:
    return f"{count / least:.2f}" if count and least else "-"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, size = ("s", 1) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)
    return f"{seconds / size:.3g} {unit}"
