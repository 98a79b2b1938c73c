"""Write down how the kernels were executed: benchmarks/results/executed.json.

TRITON_INTERPRET=1 python -m tests.support.executed source
    known answers, by Triton's interpreter and by tests/support/emulator
python -m tests.support.executed compiled FILE...
    what an emulator of compiled code has left, all of it: replaces what was there

A FILE's name is BACKEND-TARGET-HOW.json, as cuda-sm90-truncated-mixed.json, or has a number after
that, where there are several. It is a list of cases: ``case``, its name; ``kernels``, whose keys
are the kernels that it launched; and ``error``, if it missed. ``python -m benchmarks.predict`` then
writes the table.
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


def short(names: Iterable[str]) -> set[str]:
    """Of ``cka_small_kernel<float, float, 64, true>`` and the like: ``cka_small``."""
    found = (re.search(r"(\w+)_kernel\b", name) for name in names)
    return {match[1] for match in found if match}


def answered(backend: str, target: str, launched: Callable[[], Iterable[str]]) -> Run:
    """The known answers that ``auto`` asks for: how many are right, by family and kernel.

    ``launched``: the kernels that were launched since it was last asked.
    """
    families: dict[str, Counter[str]] = {}
    missed = []
    for kernels in known_answers.ALL:
        if kernels.backend != backend:
            continue
        for case in known_answers.cases_of(kernels, thorough=False):
            # Once: what runs here runs in the same order each time.
            with mock.patch.object(trial, "REPEATS", 1):
                outcome = trial.judge(kernels, case, torch.device("cpu"))
            names = short(launched())
            if outcome.good:
                families.setdefault(kernels.family, Counter()).update(names)
            else:
                missed.append(f"{kernels}: {outcome.seen}")
    counts = {family: dict(sorted(found.items())) for family, found in families.items()}
    return {"backend": backend, "target": target, "families": counts, "missed": missed}


def interpreted() -> Run:
    """By Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    run = InterpretedFunction.run

    def launched() -> list[str]:
        found = names.copy()
        names.clear()
        return found

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    with mock.patch.object(InterpretedFunction, "run", record):
        return answered("triton", "", launched)


def emulator_launches(extension: ModuleType) -> Callable[[], list[str]]:
    """What asks tests/support/emulator which kernels were launched since it was last asked."""
    library = ctypes.CDLL(extension.__file__)
    library.emulated_launches.restype = ctypes.c_char_p
    command = ["nm", "--demangle", str(extension.__file__)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^([0-9a-f]+) \w (.+)$", text, re.MULTILINE)
    names = {int(place, 16): name for place, name in symbols if "_kernel" in name}
    return lambda: [names[int(place)] for place in library.emulated_launches().split()]


def emulated_on(name: str, gpu: str, extension: ModuleType) -> Run:
    """By tests/support/emulator."""
    major, shared = emulated.GPUS[gpu]
    settings = {"RIFT_EMULATED_MAJOR": major, "RIFT_EMULATED_SHARED": shared}
    with mock.patch.dict(os.environ, settings), as_gpu.cuda(name, extension, 5):
        return answered("cuda", name, emulator_launches(extension))


def source() -> list[Run]:
    """By both."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("source needs TRITON_INTERPRET=1 in its environment")
    runs = [interpreted()]
    with tempfile.TemporaryDirectory() as folder:
        extension = emulated.build(Path(folder))
        for name, gpu in (("sm80", "global memory"), ("sm90", "clusters")):
            runs.append(emulated_on(name, gpu, extension))
    return runs


def compiled(path: Path) -> Run:
    """A summary of one file."""
    backend, target, how = re.sub(r"-\d+$", "", path.stem).split("-", 2)
    cases = json.loads(path.read_text(encoding="utf-8"))
    good = [case for case in cases if "error" not in case]
    counts = Counter(name for case in good for name in short(case["kernels"]))
    return {
        "backend": backend,
        "target": target,
        "how": how,
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
            content["source"] = source()
        case ["compiled", *names] if names:
            content["compiled"] = [compiled(Path(name)) for name in sorted(names)]
        case _:
            raise SystemExit(__doc__)
    content["versions"] = {"triton": triton.__version__, "nvcc": cuda_resources.release()}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main(sys.argv[1:])
