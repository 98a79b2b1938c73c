"""How every kernel has been executed so far, as a Markdown table.

From ``results/executed.json``, which ``python -m tests.support.executed`` writes, and from the
results of ``python -m rift_kernels check`` on GPUs that lie beside it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import environment, files
from .schema import Check
from .tables import markdown

SOURCES = {
    "triton": ("rift_kernels/backends/triton", "*.py", r"^def (\w+)_kernel\("),
    "cuda": ("csrc", "*.cuh", r"__global__[^;{}]*?\b(\w+)_kernel\("),
}
# Hopper's names; any other GPU takes the CUDA kernels of sm_80.
HOPPER = r"\bG?H\d"
NEVER = "not yet"


def kernels() -> Iterator[tuple[str, str]]:
    """Backend and name of all kernels that the sources define."""
    for backend, (folder, pattern, definition) in SOURCES.items():
        paths = (environment.ROOT / folder).rglob(pattern)
        for path in sorted(paths, key=lambda path: path.name):
            for name in re.findall(definition, path.read_text(encoding="utf-8"), re.MULTILINE):
                yield backend, name


def section(path: Path) -> str:
    """A row a kernel; columns: from its source, compiled for a GPU, on a GPU."""
    content = json.loads(path.read_text(encoding="utf-8"))
    source, compiled = content["source"], content["compiled"]
    targets = sorted({run["target"] for run in compiled})
    checks = files.newest(path.parent, Check).values()
    gpus = {c.environment.gpu: _agreeing(c, source) for c in checks if c.environment.gpu}
    counts = Counter[tuple[str, ...]]()
    for run in source:
        for family in run["families"].values():
            counts.update({(run["backend"], name): count for name, count in family.items()})
    for run in compiled:
        key = run["backend"], run["target"]
        counts.update({(*key, name): count for name, count in run["kernels"].items()})
    rows = []
    for backend, name in kernels():
        cells = [str(counts[backend, name] or NEVER)]
        for target in targets:
            elsewhere = re.search(r"_sm\d+$", name) and not name.endswith(target)
            cells.append("-" if elsewhere else str(counts[backend, target, name] or NEVER))
        on_gpus = ", ".join(gpu for gpu, agreeing in gpus.items() if (backend, name) in agreeing)
        rows.append([f"`{name}` ({backend})", *cells, on_gpus or NEVER])
    header = ["kernel", "from source", *(f"compiled, {target}" for target in targets), "on a GPU"]
    return f"{markdown(header, rows)}\n\n{_explanation(content)}"


def _agreeing(check: Check, source: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Backend and name of the kernels whose families agreed on a GPU, in every dtype."""
    target = "sm90" if re.search(HOPPER, check.environment.gpu or "") else "sm80"
    names: set[tuple[str, str]] = set()
    for run in source:
        if run["target"] not in ("", target):
            continue
        for family, counts in run["families"].items():
            key = run["backend"], family
            states = [k.good for k in check.kernels if (k.backend, k.family) == key]
            if states and all(states):
                names.update((run["backend"], name) for name in counts)
    return names


def _explanation(content: dict[str, Any]) -> str:
    runs = content["compiled"]
    cases: Counter[str] = Counter()
    for run in runs:
        cases[f"{run['backend']} {run['target']}"] += run["cases"]
    counted = ", ".join(f"{count} of {name}" for name, count in cases.items())
    ways = ", ".join(sorted({run["how"] for run in runs}))
    missed = "".join(
        f" Missed: {run['backend']} {run['target']} {run.get('how', 'from source')}, {case}."
        for run in (*content["source"], *runs)
        for case in run["missed"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return (
        "Numbers are of cases that agreed with float64 in value and gradient. From source: the "
        "known answers that `auto` asks for, by Triton's interpreter and by "
        "`tests/support/emulator`. Compiled: what the launchers launch, by an emulator of compiled "
        f"code that looks for races; a case counts once a run, of which there were {counted} "
        f"({ways}: how tensor cores add, and when asynchronous operations complete).{missed} On a "
        "GPU: `python -m rift_kernels check`, all dtypes of a family that launches the kernel. "
        f"With {versions}."
    )
