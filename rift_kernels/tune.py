"""``python -m rift_kernels.tune``: find the fastest blocks, warps and stages for this GPU.

Opt-in: the shipped ones work everywhere. For each class of shapes it starts from the configuration
in use and varies one group of its fields after another; a candidate counts only if it gives the
same value and gradient. The file is written after every class, and what it already holds is kept,
so that an interrupted run goes on where it stopped. RIFT_KERNELS_CONFIGS=FILE then uses it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import dispatch
from .functional import linear_cka

if TYPE_CHECKING:
    from .backends.triton.config import Config

DEFAULT = Path("rift_kernels_configs.json")
ROUNDS = 30
# What is not at least this much faster may be noise.
MARGIN = 0.02

Fields = dict[str, Any]


class Workload(NamedTuple):
    """Features that stand for a class of shapes."""

    rows: int
    width: int
    dtype: torch.dtype


class Trials(Protocol):
    """How one class is tried out; the tests have one that needs no GPU."""

    def agrees(self, config: Config) -> bool:
        """Whether the kernels run with it, and compute what they do with the first one."""

    def seconds(self, configs: Sequence[Config]) -> list[float]:
        """Of forward and backward, the median for each, measured in turns."""


def workload(shapes: str) -> Workload:
    form, size, kind = shapes.split()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if form == "gram":
        return Workload({"small": 64, "medium": 128, "large": 512}[size], 768, dtype)
    return Workload(8192, {"small": 64, "medium": 128, "large": 768}[size], dtype)


def groups(form: str) -> list[list[Fields]]:
    """Fields that are varied together, in the order in which they are: what matters most first."""
    backward = "backward" if form == "covariance" else "gram_backward"
    tiles = [
        {"block": b, "block_k": k, "warps": w, "stages": s, "sub": min(b // 4, 32)}
        for b, k, w, s in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4, 5))
    ]
    products = [
        {backward: (m, n, k), f"{backward}_warps": w, f"{backward}_stages": s}
        for m, n, k, w, s in product((64, 128), (64, 128), (32, 64), (4, 8), (1, 2, 3, 4))
    ]
    heads = [{"sub": r, "head_warps": w} for r, w in product((16, 32, 64), (2, 4, 8))]
    rows = [{"block_r": r} for r in (16, 32, 64)]
    if form == "covariance":
        return [tiles, products, heads, rows]
    small = [
        {"small_share": s, "small_k": k} for s, k in product((64, 128, 256, 512), (16, 32, 64))
    ]
    return [small, tiles, products, heads, rows]


def candidates(
    shapes: str, base: Config, group: Sequence[Fields], limit: int
) -> Iterator[tuple[Config, Fields]]:
    """What the group makes of ``base``: what the kernels can take, and what fits into memory."""
    from .backends.triton.config import FIELDS, ConfigError, entry

    for fields in group:
        changed = base._replace(**fields)
        if changed == base or shared_bytes(shapes, changed) > limit:
            continue
        values = {name: getattr(changed, name) for name in FIELDS[shapes.split()[0]]}
        values = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
        try:
            yield entry("a candidate", shapes, values), fields
        except ConfigError:
            continue


def shared_bytes(shapes: str, config: Config) -> int:
    """About what the hungriest kernel needs: stages, and the operands that are made of them."""
    form, _, kind = shapes.split()
    wide = 2 if kind == "bf16" else 4
    tile = config.block * config.block_k
    moments = config.stages * 2 * tile * 2
    if kind == "exact":
        moments = (config.stages - 1) * 2 * tile * 4 + 4 * tile * 2
    if form == "covariance":
        m, n, k = config.backward
        step = 2 * m * k * wide + k * n * 2
        return max(moments, (config.backward_stages - 1) * step + 2 * k * n * 2)
    m, n, k = config.gram_backward
    step = 2 * m * k * 4 + k * n * wide
    return max(moments, (config.gram_backward_stages - 1) * step + 2 * m * k * 2 + k * n * wide)


def tune(
    shapes: str,
    start: Config,
    trials: Trials,
    limit: int,
    deadline: float,
    advance: Callable[[int], object] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Config, float]:
    """The best configuration found until the deadline, and how much faster than ``start`` it is."""
    best, gain = start, 1.0
    for group in groups(shapes.split()[0]):
        rivals = []
        for config, _ in candidates(shapes, best, group, limit):
            if clock() > deadline:
                break
            if trials.agrees(config):
                rivals.append(config)
            advance(1)
        if rivals:
            before, *after = trials.seconds([best, *rivals])
            fastest = min(after)
            if fastest < before * (1 - MARGIN):
                best, gain = rivals[after.index(fastest)], gain * before / fastest
    return best, gain


class GpuTrials:
    """Forward and backward of debiased linear CKA, on features of a class."""

    def __init__(self, shapes: str, arch: str, start: Config) -> None:
        self._shapes, self._arch = shapes, arch
        rows, width, dtype = workload(shapes)
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(rows, width, device="cuda", generator=generator)
        y = x + torch.randn(rows, width, device="cuda", generator=generator)
        self._x, self._y = x.to(dtype).requires_grad_(), y.to(dtype)
        self._tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
        self._flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
        self._expected = self._run(start)

    def _run(self, config: Config) -> tuple[Tensor, Tensor]:
        from .backends.triton.config import use

        use(self._arch, self._shapes, config)
        value = linear_cka(self._x, self._y, backend="triton")
        return value.detach(), torch.autograd.grad(value, self._x)[0]

    def agrees(self, config: Config) -> bool:
        try:
            results = self._run(config)
            torch.cuda.synchronize()
        # Whatever triton raises: too much shared memory, too many registers, a compiler's error.
        except Exception:
            return False
        pairs = zip(results, self._expected, strict=True)
        return all(
            bool((a.float() - b.float()).norm() <= self._tolerance * b.float().norm())
            for a, b in pairs
        )

    def seconds(self, configs: Sequence[Config]) -> list[float]:
        times: list[list[float]] = [[] for _ in configs]
        for _ in range(ROUNDS):
            for config, own in zip(configs, times, strict=True):
                self._flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                self._run(config)
                end.record()
                end.synchronize()
                own.append(begin.elapsed_time(end) / 1e3)
        return [statistics.median(own) for own in times]


def finished(path: Path, arch: str) -> dict[str, Config]:
    """The classes that a file holds already; raises where it cannot be used."""
    from .backends.triton.config import read

    return read(path).get(arch, {}) if path.exists() else {}


def write(path: Path, arch: str, shapes: str, config: Config, remark: str) -> None:
    """Add one entry to a file, which is complete at every moment."""
    from .backends.triton.config import FIELDS

    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    fields = FIELDS[shapes.split()[0]]
    content.setdefault(arch, {})[shapes] = {name: getattr(config, name) for name in fields}
    content.setdefault("_remarks", {})[f"{arch} {shapes}"] = remark
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rift_kernels.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT, help="the file, default %(default)s")
    parser.add_argument("--form", choices=("covariance", "gram"), help="only this form's classes")
    parser.add_argument("--budget", type=float, default=120, help="seconds a class, default 120")
    options = parser.parse_args(arguments)
    reason = dispatch.reason_against("triton", torch.device("cuda"))
    if not torch.cuda.is_available():
        reason = "it needs a GPU that torch can use, and there is none"
    if reason is not None:
        print(f"rift_kernels.tune: {reason}", file=sys.stderr)
        return 2
    try:
        from tqdm import tqdm
    except ImportError:
        print("rift_kernels.tune needs tqdm: pip install 'rift_kernels[bench]'", file=sys.stderr)
        return 2
    from .backends.triton.config import CLASSES, architecture, lookup

    arch = architecture(torch.device("cuda"))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    limit = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    done = finished(options.out, arch)
    for shapes in CLASSES:
        if shapes in done or not shapes.startswith(options.form or ""):
            continue
        start = lookup(arch, shapes)
        with tqdm(desc=shapes, unit=" candidates") as bar:
            trials = GpuTrials(shapes, arch, start)
            deadline = time.monotonic() + options.budget
            best, gain = tune(shapes, start, trials, limit, deadline, bar.update)
        write(options.out, arch, shapes, best, f"{gain:.2f}x the shipped one on {properties.name}")
        print(f"{shapes}: {gain:.2f}x the shipped configuration")
    print(f"To use it: export RIFT_KERNELS_CONFIGS={options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
