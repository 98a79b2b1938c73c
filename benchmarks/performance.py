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

from . import l2_model
from .files import RESULTS
from .tables import markdown

COUNTED = RESULTS / "counted.json"
# Measured on an H200: products of bfloat16 and bytes, a second. Seconds from launch to launch.
FLOPS, BYTES, GAP = 790e12, 4.3e12, 1e-6
PROCESSORS, CLOCK, SCHEDULERS, WAVE = 132, 1.755e9, 4, 128
# Bytes a second of its L2 cache. An assumption: the A100's 5,120 bytes a clock, which table 3 of
# PMC10448217 takes for the H100 as well. NVIDIA publishes none for Hopper.
L2_BYTES = 5120 * CLOCK
SECTOR = 32
BLOCK = 128
# Rows from which on the covariance form is counted.
SHORTEST = 512
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
    """What the mathematics asks of one launch."""

    products: float  # multiply-adds
    bytes: float  # that come from memory or go there
    # How much longer than all others on average the busiest processor multiplies.
    unevenness: float = 1


def needs(backend: str, n: int, d: int, layers: int, debiased: bool) -> dict[str, Need]:
    """By kernel: linear CKA of bfloat16 features near the teacher's, and the student's gradient.

    No row is long. Symmetric products count half. Runs of more than SHORTEST rows stand for longer
    ones, which take the covariance form.
    """
    if n < min(2 * d, SHORTEST):
        return _gram_form(backend, n, d, layers)
    form = _triton_covariance if backend == "triton" else _cuda_covariance
    return form(n, d, layers, debiased)


def _gram_form(backend: str, n: int, d: int, layers: int) -> dict[str, Need]:
    features, grams = 2 * n * d * layers, 2 * 4 * n * n * layers
    products, gradient = n * (n + 1) * d * layers, n * n * d * layers
    backward = Need(2 * gradient, 2 * features + grams)
    if n > 128:
        tiles = -(-n // BLOCK)
        partial = 4 * tiles * (tiles + 1) * BLOCK**2 * layers
        moments, head = Need(products, 2 * features + partial), Need(0, partial + grams)
        return {"raw_moments": moments, "gram_cka": head, "gram_backward": backward}
    # Features are centered and split in two: three products.
    if backend == "triton":
        return {
            "gram_cka_small": Need(3 * products, 2 * features + grams),
            "gram_backward": backward,
        }
    small = Need(3 * products + 3 * gradient, 3 * features)
    return {"cka_small": small, "scale": Need(0, 2 * features)}


def _triton_covariance(n: int, d: int, layers: int, debiased: bool) -> dict[str, Need]:
    products, gradient, features, planes = _covariance(n, d, layers)
    again = _read_again(features)
    tiles = l2_model.launch(n, d, layers)
    read, steps = l2_model.run(tiles)
    partial = 4 * tiles.parts * BLOCK**2
    # Whatever comes first brings the features into the cache: `longest`, or the column programs.
    # These leave them to the tile programs.
    longest = {"longest": Need(0, features)} if debiased else {}
    moved = (again if debiased else features) + (again and read) + partial
    # A processor holds one program at a time, of 128 x 256 where the width is a multiple.
    columns = 2 * BLOCK if d % (2 * BLOCK) == 0 else BLOCK
    programs = -(-n // BLOCK) * -(-d // columns) * layers
    rounds = -(-programs // PROCESSORS)
    return {
        **longest,
        "raw_moments": Need(products, moved, steps / tiles.even),
        "covariance_cka": Need(0, partial + 2 * planes + (again if debiased else 0)),
        "covariance_backward": Need(
            gradient, 1.5 * features + planes, rounds * PROCESSORS / programs
        ),
    }


def _cuda_covariance(n: int, d: int, layers: int, debiased: bool) -> dict[str, Need]:
    products, gradient, features, planes = _covariance(n, d, layers)
    again = _read_again(features)
    blocks = -(-d // BLOCK)
    partial = 4 * blocks * (2 * blocks + 1) * BLOCK**2 * layers
    # Clusters of two processors take pairs of tiles. If few are left at the end, half a pair each.
    pairs, clusters = -(-n // (2 * BLOCK)) * -(-d // (2 * BLOCK)), PROCESSORS // 2
    left = pairs % clusters
    last = 0 if not left else 0.5 if 2 * left <= clusters else 1
    rounds = pairs // clusters + last
    rows = {"longest": Need(0, again), "row_terms": Need(0, 0)} if debiased else {}
    return {
        "statistics": Need(0, features),
        "means": Need(0, 0),
        **rows,
        "moments_sm90": Need(products, partial + again),
        "cka_large_head": Need(0, partial + 2 * planes),
        "backward_sm90": Need(gradient, 1.5 * features + planes, rounds * clusters / pairs),
    }


def _covariance(n: int, d: int, layers: int) -> tuple[float, float, float, float]:
    """Products of moments and gradient; bytes of both features, and of the planes' high halves,
    all that the backward reads near the teacher."""
    products, gradient = n * (d * (d + 1) + d * d) * layers, 2 * n * d * d * layers
    return products, gradient, 4 * n * d * layers, 4 * (-(-d // BLOCK) * BLOCK) ** 2 * layers


def _read_again(features: float) -> float:
    """Bytes from memory of features that have been read before: none if all are in the cache."""
    return 0 if features < l2_model.L2_BYTES else features


class Run(NamedTuple):
    """Linear CKA and its student's gradient, of bfloat16 features near the teacher's."""

    backend: str
    target: str
    rows: int
    width: int
    layers: int
    debiased: bool


@cache
def recorded() -> dict[Run, dict[str, Counts]]:
    """All runs in the file of counts, with the counts of each kernel."""
    content = json.loads(COUNTED.read_text(encoding="utf-8"))
    return {Run(**entry["run"]): entry["kernels"] for entry in content["runs"]}


def counts(backend: str, n: int, d: int, layers: int, debiased: bool) -> dict[str, Counts]:
    """What a run executes on an H200, by kernel; nothing if that was not counted.

    A run that is too long for an emulator lies on the line through the two longest of its width.
    """
    wanted = Run(backend, "sm90", n, d, layers, debiased)
    if wanted in recorded():
        return recorded()[wanted]
    same = sorted(run for run in recorded() if run == wanted._replace(rows=run.rows))
    if len(same) < 2:
        return {}
    shorter, longer = same[-2:]
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
        "products": 2 * counted["products"] / FLOPS * need.unevenness,
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
    counted_kernels = counts(backend, n, d, layers, debiased)
    if not counted_kernels:
        return []
    need = needs(backend, n, d, layers, debiased)
    rows, least, most = [], 0.0, 0.0
    for kernel, counted in counted_kernels.items():
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


def shape(n: int, d: int, layers: int) -> str:
    return f"{layers} layers of {n} x {d}" if layers > 1 else f"{n} x {d}"


def _ratio(count: float, least: float) -> str:
    return f"{count / least:.2f}" if count and least else "-"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, size = ("s", 1) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)
    return f"{seconds / size:.3g} {unit}"
