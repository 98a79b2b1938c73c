"""``python -m rift_kernels tune``: find the fastest blocks, warps and stages for this GPU.

Opt-in: the shipped ones work everywhere. For each class of shapes it starts from the configuration
in use and varies one group of its fields after another; a candidate counts only if it gives the
same value and gradient. The file is written after every class and keeps what it already holds, so
an interrupted run resumes where it stopped. RIFT_KERNELS_CONFIGS=FILE then uses the file.
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

from rift_kernels.dispatch import availability
from rift_kernels.functional import linear_cka

if TYPE_CHECKING:
    from rift_kernels.backends.triton.config import Config

DEFAULT = Path("rift_kernels_configs.json")
ROUNDS = 30
# A smaller gain may be noise.
MARGIN = 0.02

Fields = dict[str, Any]


class Workload(NamedTuple):
    """Features that represent a class of shapes."""

    rows: int
    width: int
    dtype: torch.dtype


class Trials(Protocol):
    """Tries the configurations of one class."""

    def agrees(self, config: Config) -> bool:
        """Whether the kernels run with ``config`` and give the results of the first one."""

    def seconds(self, configs: Sequence[Config]) -> list[float]:
        """The median time of forward and backward with each configuration."""


def workload(shapes: str) -> Workload:
    """The features that a class is tuned on."""
    form, size, kind = shapes.split()
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if form == "gram":
        return Workload({"small": 64, "medium": 128, "large": 512}[size], 768, dtype)
    return Workload(8192, {"small": 64, "medium": 128, "large": 768}[size], dtype)


def groups(shapes: str) -> list[list[Fields]]:
    """Groups of fields that are varied together, the most important first."""
    form, size, _ = shapes.split()
    backward = "backward" if form == "covariance" else "gram_backward"
    columns, depths, warps = (64, 128), (32, 64), (4, 8)
    if form == "gram" and size != "large":
        small = product((64, 128, 256, 512), (16, 32, 64))
        # Any depth covers all rows in one step.
        tiles = product((32, *columns), warps)
        return [
            [{"small_share": share, "small_k": k} for share, k in small],
            [{backward: (64, n, 64), f"{backward}_warps": w} for n, w in tiles],
        ]
    moments = product((64, 128), (32, 64, 128), warps, (2, 3, 4, 5))
    widths = columns if form == "gram" else (*columns, 256)
    products = product(columns, widths, depths, warps, (1, 2, 3, 4))
    heads = product((16, 32, 64), (2, 4, 8))
    return [
        [{"block": b, "block_k": k, "warps": w, "stages": s} for b, k, w, s in moments],
        [
            {backward: (m, n, k), f"{backward}_warps": w, f"{backward}_stages": s}
            for m, n, k, w, s in products
        ],
        [{"sub": rows, "head_warps": w} for rows, w in heads],
        [{"block_r": rows} for rows in (16, 32, 64)],
    ]


def candidates(shapes: str, base: Config, group: Sequence[Fields], limit: int) -> Iterator[Config]:
    """The variants of ``base`` in a group that the kernels accept and shared memory can hold."""
    from rift_kernels.backends.triton.config import FIELDS, ConfigError, entry

    form = shapes.split()[0]
    for fields in group:
        changed = base._replace(**fields)
        if form == "covariance" and "block" in fields:
            # The depth of the backward must divide it.
            m, n, k = changed.backward
            changed = changed._replace(backward=(m, n, min(k, changed.block)))
        if "block" in fields:
            changed = changed._replace(sub=min(changed.sub, changed.block))
        if changed == base or shared_bytes(shapes, changed) > limit:
            continue
        try:
            yield entry("a candidate", shapes, _as_json(changed, FIELDS[form]))
        except ConfigError:
            continue


def _as_json(config: Config, fields: Sequence[str]) -> Fields:
    values = {name: getattr(config, name) for name in fields}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def shared_bytes(shapes: str, config: Config) -> int:
    """An estimate for the kernel that needs most: its stages, and operands made from the last."""
    form, _, kind = shapes.split()
    is_split, itemsize = (False, 2) if kind == "bf16" else (True, 4)
    tile = config.block * config.block_k
    moments = 2 * tile * 2 * config.stages
    if is_split:
        moments = 2 * tile * 4 * (config.stages - 1) + 4 * tile * 2
    if form == "covariance":
        m, n, k = config.backward
        step = 2 * m * k * itemsize + k * n * 2
        return max(moments, step * (config.backward_stages - 1) + 2 * k * n * 2)
    m, n, k = config.gram_backward
    step = 2 * m * k * 4 + k * n * itemsize
    return max(moments, step * (config.gram_backward_stages - 1) + 2 * m * k * 2 + k * n * itemsize)


def tune(
    shapes: str,
    start: Config,
    trials: Trials,
    limit: int,
    budget: float,
    advance: Callable[[int], object] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Config, float]:
    """The best configuration found within ``budget`` seconds, and how much faster it is."""
    best, gain, begin = start, 1.0, clock()
    all_groups = groups(shapes)
    for number, group in enumerate(all_groups, 1):
        rivals = []
        for config in candidates(shapes, best, group, limit):
            if clock() > begin + budget * number / len(all_groups):
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
    """Debiased linear CKA, forward and backward, replayed so that only the GPU's time counts."""

    def __init__(self, shapes: str, arch: str, start: Config) -> None:
        self._shapes, self._arch = shapes, arch
        rows, width, dtype = workload(shapes)
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(rows, width, device="cuda", generator=generator)
        y = x + torch.randn(rows, width, device="cuda", generator=generator)
        self._x, self._y = x.to(dtype).requires_grad_(), y.to(dtype)
        self._tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
        self._cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
        self._expected = self._run(start)

    def _run(self, config: Config) -> tuple[Tensor, Tensor]:
        from rift_kernels.backends.triton.config import use

        use(self._arch, self._shapes, config)
        value = linear_cka(self._x, self._y, backend="triton")
        return value.detach(), torch.autograd.grad(value, self._x)[0]

    def agrees(self, config: Config) -> bool:
        """See :class:`Trials`."""
        try:
            results = self._run(config)
            torch.cuda.synchronize()
        # Triton raises many types: too much shared memory, too many registers, compiler errors.
        except Exception:
            return False
        pairs = zip(results, self._expected, strict=True)
        return all(
            bool((a.float() - b.float()).norm() <= self._tolerance * b.float().norm())
            for a, b in pairs
        )

    def seconds(self, configs: Sequence[Config]) -> list[float]:
        """See :class:`Trials`; interleaved, each with cold caches."""
        graphs = [self._graph(config) for config in configs]
        times: list[list[float]] = [[] for _ in configs]
        for _ in range(ROUNDS):
            for graph, graph_times in zip(graphs, times, strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._cache.zero_()
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                graph_times.append(begin.elapsed_time(end) / 1e3)
        return [statistics.median(graph_times) for graph_times in times]

    def _graph(self, config: Config) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(config)
        return graph


def finished(path: Path, arch: str) -> dict[str, Config]:
    """The classes that a file already holds; raises if it cannot be used."""
    from rift_kernels.backends.triton.config import read

    return read(path).get(arch, {}) if path.exists() else {}


def write(path: Path, arch: str, shapes: str, config: Config, remark: str) -> None:
    """Add an entry to a file, replacing the whole file at once."""
    from rift_kernels.backends.triton.config import FIELDS

    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.setdefault(arch, {})[shapes] = _as_json(config, FIELDS[shapes.split()[0]])
    content.setdefault("_remarks", {})[f"{arch} {shapes}"] = remark
    temporary = path.with_suffix(f"{path.suffix}.new")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if all classes are tuned, 1 for a bad file, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m rift_kernels tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT, help="the file, default %(default)s")
    parser.add_argument("--form", choices=("covariance", "gram"), help="only this form's classes")
    parser.add_argument("--budget", type=float, default=300, help="seconds per class, default 300")
    options = parser.parse_args(arguments)
    reason = "it needs a GPU that torch can use, and there is none"
    if torch.cuda.is_available():
        reason = availability.reason_against("triton", torch.device("cuda")) or ""
    if reason:
        print(f"rift_kernels tune cannot run: {reason}", file=sys.stderr)
        return 2
    try:
        from tqdm import tqdm
    except ImportError:
        print(
            "rift_kernels tune needs tqdm: pip install 'rift_kernels[bench]'",
            file=sys.stderr,
        )
        return 2
    from rift_kernels.backends.triton.config import CLASSES, ConfigError, architecture, lookup

    arch = architecture(torch.device("cuda"))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    limit = getattr(properties, "shared_memory_per_block_optin", 0) or 64 * 1024
    try:
        tuned = finished(options.out, arch)
    except ConfigError as error:
        print(f"rift_kernels tune: {error}", file=sys.stderr)
        return 1
    for shapes in CLASSES:
        if shapes in tuned or not shapes.startswith(options.form or ""):
            continue
        start = lookup(arch, shapes)
        with tqdm(desc=shapes, unit=" candidates") as bar:
            trials = GpuTrials(shapes, arch, start)
            best, gain = tune(shapes, start, trials, limit, options.budget, bar.update)
        text = f"{gain:.2f}x as fast as the shipped configuration"
        write(options.out, arch, shapes, best, f"{text}, on {properties.name}")
        print(f"{shapes}: {text}")
    print(f"To use it: export RIFT_KERNELS_CONFIGS={options.out.resolve()}")
    return 0
