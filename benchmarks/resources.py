"""The registers and shared memory of the kernels as Markdown tables.

From ``results/triton-resources.json``, which ``python -m tests.support.triton_compile`` writes, and
``results/cuda-resources.json``, which ``python -m tests.support.cuda_resources`` writes.
"""

from __future__ import annotations

import json
from pathlib import Path

from .tables import markdown

FEATURES = ("bf16", "fp16", "fp32", "fp64")


def section(path: Path) -> str:
    """A row a kernel and kind of features, a column a target: the most that any case needs."""
    content = json.loads(path.read_text(encoding="utf-8"))
    version = content.pop("triton")
    del content["sources"]
    most: dict[str, dict[str, tuple[int, int]]] = {}
    for target, cases in content.items():
        for case, kernels in cases.items():
            # A string is the reason why triton does not compile it.
            for kernel in [] if isinstance(kernels, str) else kernels:
                row = most.setdefault(_name(kernel["kernel"], case), {})
                before = row.get(target, (0, 0))
                row[target] = (
                    max(before[0], kernel["registers"]),
                    max(before[1], kernel["shared"]),
                )
    rows = [
        [name, *(_cell(row.get(target)) for target in content)]
        for name, row in sorted(most.items())
    ]
    caption = (
        "Registers a thread and KiB of shared memory a program, the most of all cases that "
        f"`tests/support/triton_compile.py` compiles; triton {version}."
    )
    return f"{markdown(['kernel', *content], rows)}\n\n{caption}"


def _name(kernel: str, case: str) -> str:
    features = next(name for name in FEATURES if name in case)
    return f"{kernel.removesuffix('_kernel')}, {features}"


def _cell(needs: tuple[int, int] | None) -> str:
    return "-" if needs is None else f"{needs[0]} / {needs[1] / 1024:.0f}"


def cuda_section(path: Path) -> str:
    """A row a CUDA kernel, a column an architecture."""
    content = json.loads(path.read_text(encoding="utf-8"))
    release = content.pop("nvcc")
    rows: dict[str, dict[str, str]] = {}
    for arch, kernels in content.items():
        for kernel, needs in kernels.items():
            # Whether blocks meet in a cluster goes with the architecture.
            name = kernel.replace(", true>", ">").replace(", false>", ">")
            rows.setdefault(name, {})[arch] = str(needs["registers"])
    table = markdown(
        ["kernel", *content],
        [[f"`{name}`", *(row.get(arch, "-") for arch in content)] for name, row in rows.items()],
    )
    return (
        f"{table}\n\nRegisters a thread, nothing spilled; types of features and gradients, rows; "
        f"nvcc {release}."
    )
