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
    """The most that any case needs: a row a kernel and dtype, a column a target."""
    content = json.loads(path.read_text(encoding="utf-8"))
    version = content.pop("triton")
    del content["sources"]
    needs: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for target, cases in content.items():
        for case, kernels in cases.items():
            features = next(name for name in FEATURES if name in case)
            # A string is the reason why triton does not compile the case.
            for kernel in [] if isinstance(kernels, str) else kernels:
                name = f"{kernel['kernel'].removesuffix('_kernel')}, {features}"
                need = kernel["registers"], kernel["shared"]
                needs.setdefault(name, {}).setdefault(target, []).append(need)
    rows = [[name, *(_most(row.get(target)) for target in content)] for name, row in needs.items()]
    return (
        f"{markdown(['kernel', *content], sorted(rows))}\n\n"
        "Registers a thread and KiB of shared memory a program, the most of all cases that "
        f"`tests/support/triton_compile.py` compiles; triton {version}."
    )


def _most(needs: list[tuple[int, int]] | None) -> str:
    if needs is None:
        return "-"
    registers, shared = map(max, zip(*needs, strict=True))
    return f"{registers} / {shared / 1024:.0f}"


def cuda_section(path: Path) -> str:
    """A row a CUDA kernel, a column an architecture."""
    content = json.loads(path.read_text(encoding="utf-8"))
    release = content.pop("nvcc")
    rows: dict[str, dict[str, str]] = {}
    for arch, kernels in content.items():
        for kernel, needs in kernels.items():
            # The architecture decides whether blocks meet in a cluster.
            name = kernel.replace(", true>", ">").replace(", false>", ">")
            rows.setdefault(name, {})[arch] = str(needs["registers"])
    cells = [[f"`{name}`", *(row.get(arch, "-") for arch in content)] for name, row in rows.items()]
    return (
        f"{markdown(['kernel', *content], cells)}\n\nRegisters a thread, nothing spilled; types of "
        f"features and gradients, rows; nvcc {release}."
    )
