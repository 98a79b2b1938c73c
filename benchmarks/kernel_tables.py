"""Markdown tables of the kernels: what they compile to, and how each was executed so far.

They come from ``benchmarks/results``. Commands in ``tests/support`` write three of the files there:
``triton_compile``, ``cuda_resources`` and ``executed``; ``python -m rift_kernels check`` on a GPU
writes the others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import environment, files
from .schema import Check
from .tables import markdown

SOURCES = {
    "triton": ("rift_kernels/backends/triton", "*.py", r"^def (\w+)_kernel\("),
    "cuda": ("csrc", "*.cuh", r"__global__[^;{}]*?\b(\w+)_kernel\("),
}
NEVER = "not yet"


def triton_resources(path: Path) -> str:
    """The most that any case needs: a row a kernel and dtype, a column a target."""
    content = json.loads(path.read_text(encoding="utf-8"))
    version = content.pop("triton")
    del content["sources"]
    needs: dict[tuple[str, str], tuple[int, int]] = {}
    for target, cases in content.items():
        for case, kernels in cases.items():
            (dtype,) = re.findall("bf16|fp16|fp32|fp64", case)
            # A string is the reason why triton does not compile the case.
            for kernel in [] if isinstance(kernels, str) else kernels:
                key = f"{kernel['kernel'].removesuffix('_kernel')}, {dtype}", target
                registers, shared = needs.get(key, (0, 0))
                needs[key] = max(registers, kernel["registers"]), max(shared, kernel["shared"])
    cells = {
        key: f"{registers} / {shared / 1024:.0f}" for key, (registers, shared) in needs.items()
    }
    return (
        f"{_by_target(dict(sorted(cells.items())), content)}\n\n"
        "Registers a thread and KiB of shared memory a program, the most of all cases that "
        f"`tests/support/triton_compile.py` compiles; triton {version}."
    )


def cuda_resources(path: Path) -> str:
    """A row a CUDA kernel, a column an architecture."""
    content = json.loads(path.read_text(encoding="utf-8"))
    release = content.pop("nvcc")
    # The architecture decides whether blocks meet in a cluster.
    cells = {
        (f"`{re.sub(', (true|false)>', '>', kernel)}`", target): str(needs["registers"])
        for target, kernels in content.items()
        for kernel, needs in kernels.items()
    }
    return (
        f"{_by_target(cells, content)}\n\nRegisters a thread, nothing spilled; types of "
        f"features and gradients, rows; nvcc {release}."
    )


def _by_target(cells: Mapping[tuple[str, str], str], targets: Iterable[str]) -> str:
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(cells.get((name, target), "-") for target in targets)] for name in names]
    return markdown(["kernel", *targets], rows)


def defined() -> Iterator[tuple[str, str]]:
    """Backend and name of all kernels that the sources define."""
    for backend, (folder, pattern, definition) in SOURCES.items():
        paths = (environment.ROOT / folder).rglob(pattern)
        for path in sorted(paths, key=lambda path: path.name):
            for name in re.findall(definition, path.read_text(encoding="utf-8"), re.MULTILINE):
                yield backend, name


def executed(path: Path) -> str:
    """A row a kernel; columns: from its source, compiled for a GPU, on a GPU."""
    content = json.loads(path.read_text(encoding="utf-8"))
    source, compiled = content["source"], content["compiled"]
    targets = sorted({run["target"] for run in compiled})
    checks = files.newest(path.parent, Check).values()
    gpus = {c.environment.gpu: _agreeing(c, source) for c in checks if c.environment.gpu}
    counts, cases = Counter[tuple[str, ...]](), Counter[str]()
    for run in source:
        for family in run["families"].values():
            counts.update({(run["backend"], name): count for name, count in family.items()})
    for run in compiled:
        key = run["backend"], run["target"]
        counts.update({(*key, name): count for name, count in run["kernels"].items()})
        cases[" ".join(key)] += run["cases"]
    rows = []
    for backend, name in defined():
        cells = [str(counts[backend, name] or NEVER)]
        for target in targets:
            elsewhere = re.search(r"_sm\d+$", name) and not name.endswith(target)
            cells.append("-" if elsewhere else str(counts[backend, target, name] or NEVER))
        on_gpus = ", ".join(gpu for gpu, agreeing in gpus.items() if (backend, name) in agreeing)
        rows.append([f"`{name}` ({backend})", *cells, on_gpus or NEVER])
    header = ["kernel", "from source", *(f"compiled, {target}" for target in targets), "on a GPU"]
    counted = ", ".join(f"{count} of {name}" for name, count in cases.items())
    modes = ", ".join(sorted({run["mode"] for run in compiled}))
    missed = "".join(
        f" Missed: {run['backend']} {run['target']} {run.get('mode', 'from source')}, {case}."
        for run in (*source, *compiled)
        for case in run["missed"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return (
        f"{markdown(header, rows)}\n\n"
        "Numbers are of cases that agreed with float64 in value and gradient. From source: the "
        "known answers that `auto` asks for, by Triton's interpreter and by "
        "`tests/support/emulator`. Compiled: what the launchers launch, by an emulator of compiled "
        f"code that looks for races; a case counts once a run, of which there were {counted} "
        f"({modes}: how tensor cores add, and when asynchronous operations complete).{missed} On a "
        "GPU: `python -m rift_kernels check`, all dtypes of a family that launches the kernel. "
        f"With {versions}."
    )


def _agreeing(check: Check, source: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Backend and name of the kernels whose families agreed on a GPU, in every dtype."""
    # Hopper's names; any other GPU takes the CUDA kernels of sm_80.
    target = "sm90" if re.search(r"\bG?H\d", check.environment.gpu or "") else "sm80"
    names: set[tuple[str, str]] = set()
    for run in source:
        for family, counts in run["families"].items():
            key = run["backend"], family
            states = [k.good for k in check.kernels if (k.backend, k.family) == key]
            if run["target"] in ("", target) and states and all(states):
                names.update((run["backend"], name) for name in counts)
    return names
