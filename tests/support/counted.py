"""Record in benchmarks/results/counted.json what the compiled kernels execute.

python -m tests.support.counted EMULATOR           all runs, a quarter of an hour
python -m tests.support.counted EMULATOR --check   the small ones: exits with 1 where a count grew

EMULATOR is the folder of an emulator of compiled code, whose module ``run`` executes a call of
``rift_kernels`` and whose module ``ptx`` counts. Counts do not depend on the machine. They do
depend on the versions of Triton and nvcc, and are compared with those of the same versions only.
``python -m benchmarks.predict`` then writes the tables.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.performance import COUNTED, PROCESSORS, SHORTEST, Run

ROOT = Path(__file__).parents[2]
# The name in `cka_small_kernel<Bf16, Bf16, 64, true>`.
KERNEL = re.compile(r"(\w+)_kernel\b")
# What is recorded: name -> the emulator's counters that it adds up. A sector has 32 bytes. A wave
# is what shared memory serves at once, 128 bytes at best. `least` is what the bytes asked for take.
COUNTERS = {
    "programs": ("ctas",),
    "warps": ("warps",),
    "instructions": ("warp_instructions",),  # of warps
    "products": ("mma_macs", "wgmma_macs"),  # multiply-adds on tensor cores
    "load_sectors": ("load_global_sectors", "cp_async_sectors"),
    "load_least": ("load_global_ideal", "cp_async_ideal"),
    "engine_sectors": ("tma_sectors",),  # of the copy engine, which wastes none
    "store_sectors": ("store_global_sectors",),
    "store_least": ("store_global_ideal",),
    "shared_waves": ("load_shared_waves", "store_shared_waves", "ldmatrix_waves"),
    "shared_least": ("load_shared_ideal", "store_shared_ideal", "ldmatrix_ideal"),
    "operand_bytes": ("wgmma_shared_bytes",),  # that tensor cores read from shared memory
    "barriers": ("barrier_waits",),  # of warps
}
# What must not grow, and by how much it may.
WATCHED = ("instructions", "products", "load_sectors", "store_sectors", "shared_waves", "barriers")
SLACK = 1.01
# What --check counts again.
CHECKED = (
    Run("triton", "sm90", 64, 768, 1, True),
    Run("triton", "sm90", 256, 768, 12, True),
    Run("triton", "sm90", 1576, 768, 1, True),
    Run("triton", "sm80", 788, 264, 1, True),
    Run("cuda", "sm90", 64, 768, 1, True),
    Run("cuda", "sm90", 1576, 768, 1, True),
    Run("cuda", "sm80", 788, 264, 1, True),
)
# Of benchmarks.performance.SHAPES, the longest extrapolated from two that are shorter.
PREDICTED = tuple(
    Run(backend, "sm90", *shape, debiased)
    for backend in ("triton", "cuda")
    for debiased in (True, False)
    for shape in (
        *((64, 768, 1), (256, 768, 12), (12608, 768, 1)),
        *((3152, 1024, 1), (6304, 1024, 1), (512, 4096, 1), (1024, 4096, 1)),
    )
    # In Gram form, the CUDA kernels take few rows only. Biased, fewer rows than columns are never
    # near: the backward multiplies low halves, as it would not with many rows.
    if (backend, shape[0]) != ("cuda", 256) and (debiased or shape[1] < 4096)
)


def load(folder: Path) -> tuple[ModuleType, ModuleType]:
    """The emulator's modules. It starts this command again, with an allocator of its own."""
    os.environ["RIFT_PROJECT"] = os.environ["PYTHONPATH"] = str(ROOT)
    sys.path.insert(0, str(folder.resolve()))
    return importlib.import_module("run"), importlib.import_module("ptx")


def count(run: Run, emulator: ModuleType, ptx: ModuleType) -> dict[str, dict[str, int]]:
    """What each kernel of a run executes."""
    from rift_kernels.dispatch import plan

    ptx.reset()
    ptx.options.race, ptx.options.seed = 0, 1
    case = emulator.Case(
        str(run),
        [(run.rows, run.width, run.width)] * run.layers,
        debiased=run.debiased,
        near=1e-2,
        grads=(True, False),
    )
    # The shorter of two runs may be short enough for the Gram form, which the longest is not.
    form = mock.patch.object(plan, "use_gram", return_value=run.rows < SHORTEST)
    options = Namespace(processors=PROCESSORS)
    with emulator.context(run.backend, run.target, case, options), form:
        emulator.execute(case, run.backend)
    kernels: dict[str, Counter[str]] = {}
    for function, counters in ptx.totals().items():
        counts = kernels.setdefault(KERNEL.search(function)[1], Counter())
        counts.update({n: sum(counters[part] for part in parts) for n, parts in COUNTERS.items()})
    return {kernel: dict(counts) for kernel, counts in kernels.items()}


def versions() -> dict[str, str]:
    import triton

    from tests.support import cuda_resources

    return {"triton": triton.__version__, "nvcc": cuda_resources.release()}


def growth(
    run: Run, now: Mapping[str, Mapping[str, int]], then: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """A sentence for each count that grew."""
    grown = []
    for kernel, counts in now.items():
        for name in WATCHED:
            before = then.get(kernel, {}).get(name)
            if before is None:
                grown.append(f"{run}: {kernel} is not in {COUNTED.name}")
                break
            if counts[name] > before * SLACK:
                grown.append(f"{run}: {kernel}: {counts[name]:,} {name}, once {before:,}")
    return grown


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.counted", description=__doc__)
    parser.add_argument("emulator", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(words)
    emulator, ptx = load(arguments.emulator)
    recorded: dict[str, Any] = json.loads(COUNTED.read_text("utf-8")) if COUNTED.exists() else {}
    if arguments.check and recorded.get("versions") != versions():
        print(f"Not compared: {COUNTED.name} is of {recorded.get('versions')}, here {versions()}")
        return 0
    then = {Run(**entry["run"]): entry["kernels"] for entry in recorded.get("runs", [])}
    entries, grown = [], []
    # Each once.
    for run in dict.fromkeys(CHECKED if arguments.check else (*CHECKED, *PREDICTED)):
        kernels = count(run, emulator, ptx)
        print(run, flush=True)
        entries.append({"run": run._asdict(), "kernels": kernels})
        grown += growth(run, kernels, then.get(run, {}))
        if not arguments.check:
            write(entries)
    print("\n".join(grown))
    return int(arguments.check and bool(grown))


def write(entries: Sequence[dict[str, Any]]) -> None:
    """The file, with a line for each run."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    head = json.dumps({"processors": PROCESSORS, "versions": versions()})[:-1]
    COUNTED.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
