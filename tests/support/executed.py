"""Record in benchmarks/results/executed.json which kernels were executed, and how.

TRITON_INTERPRET=1 python -m tests.support.executed source
    runs the known answers in Triton's interpreter and in tests/support/emulator
python -m tests.support.executed compiled FILE...
    reads all results of an emulator of compiled code, and replaces the earlier ones

A FILE is named BACKEND-TARGET-MODE.json, such as cuda-sm90-truncated-mixed.json; a number may
follow where a mode has several files. It is a list of cases: ``case`` is the name, the keys of
``kernels`` are the kernels that were launched, and ``error`` is there if the case missed. ``python
-m benchmarks.predict`` then writes the table.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from rift_kernels.commands import trial
from rift_kernels.trust import known_answers
from tests import as_gpu
from tests.support import cuda_resources, emulated

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "executed.json"
Run = dict[str, Any]


def kernel_names(functions: Iterable[str]) -> set[str]:
    """``cka_small`` for ``cka_small_kernel<float, float, 64, true>``, and the like."""
    matches = (re.search(r"(\w+)_kernel\b", function) for function in functions)
    return {match[1] for match in matches if match}


def run_known_answers(backend: str, target: str, new_launches: Callable[[], Iterable[str]]) -> Run:
    """How many of the known answers that ``auto`` asks for are right, by family and kernel.

    ``new_launches`` returns the functions launched since its last call.
    """
    families: dict[str, Counter[str]] = {}
    missed = []
    for kernels in known_answers.ALL:
        if kernels.backend != backend:
            continue
        for case in known_answers.cases_of(kernels, thorough=False):
            # Once, because interpreter and emulator run everything in the same order each time.
            with mock.patch.object(trial, "REPEATS", 1):
                outcome = trial.judge(kernels, case, torch.device("cpu"))
            names = kernel_names(new_launches())
            if outcome.good:
                families.setdefault(kernels.family, Counter()).update(names)
            else:
                missed.append(f"{kernels}: {outcome.seen}")
    counts = {family: dict(sorted(counter.items())) for family, counter in families.items()}
    return {"backend": backend, "target": target, "families": counts, "missed": missed}


def run_interpreted() -> Run:
    """The known answers in Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    functions: list[str] = []
    run = InterpretedFunction.run

    def new_launches() -> list[str]:
        launches = functions.copy()
        functions.clear()
        return launches

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        functions.append(self.fn.__name__)
        return run(self, *arguments, **options)

    with mock.patch.object(InterpretedFunction, "run", record):
        return run_known_answers("triton", "", new_launches)


def emulator_launches(extension: ModuleType) -> Callable[[], list[str]]:
    """A function that returns the kernels tests/support/emulator launched since its last call."""
    library = ctypes.CDLL(extension.__file__)
    library.emulated_launches.restype = ctypes.c_char_p
    command = ["nm", "--demangle", str(extension.__file__)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^([0-9a-f]+) \w (.+)$", text, re.MULTILINE)
    functions = {int(address, 16): name for address, name in symbols if "_kernel" in name}
    return lambda: [functions[int(address)] for address in library.emulated_launches().split()]


def run_emulated(target: str, gpu: str, extension: ModuleType) -> Run:
    """The known answers in tests/support/emulator."""
    major, shared = emulated.GPUS[gpu]
    settings = {"RIFT_EMULATED_MAJOR": major, "RIFT_EMULATED_SHARED": shared}
    with mock.patch.dict(os.environ, settings), as_gpu.cuda(target, extension, 5):
        return run_known_answers("cuda", target, emulator_launches(extension))


def source_runs() -> list[Run]:
    """The known answers in the interpreter and in the emulator."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("source needs TRITON_INTERPRET=1 in its environment")
    runs = [run_interpreted()]
    with tempfile.TemporaryDirectory() as folder:
        extension = emulated.build(Path(folder))
        for target, gpu in (("sm80", "global memory"), ("sm90", "clusters")):
            runs.append(run_emulated(target, gpu, extension))
    return runs


def compiled_run(path: Path) -> Run:
    """The summary of a file."""
    backend, target, mode = re.sub(r"-\d+$", "", path.stem).split("-", 2)
    cases = json.loads(path.read_text(encoding="utf-8"))
    good = [case for case in cases if "error" not in case]
    counts = Counter(name for case in good for name in kernel_names(case["kernels"]))
    return {
        "backend": backend,
        "target": target,
        "mode": mode,
        "cases": len(good),
        "missed": [f"{case['case']}: {case['error']}" for case in cases if "error" in case],
        "kernels": dict(sorted(counts.items())),
    }


def main(words: Sequence[str]) -> None:
    import triton

    content: dict[str, Any] = {"source": [], "compiled": []}
    if RESULT.exists():
        content = json.loads(RESULT.read_text(encoding="utf-8"))
    match list(words):
        case ["source"]:
            content["source"] = source_runs()
        case ["compiled", *names] if names:
            content["compiled"] = [compiled_run(Path(name)) for name in sorted(names)]
        case _:
            raise SystemExit(__doc__)
    content["versions"] = {"triton": triton.__version__, "nvcc": cuda_resources.release()}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main(sys.argv[1:])
