"""``python -m benchmarks.gpu_check``: everything that needs a GPU, in nine minutes and offline.

Installs nothing: this interpreter and what it has. Four parts, each a process with a time limit:
build what there is to build, run the tests on the GPU, run every kernel under compute-sanitizer,
run the benchmarks. ``PART=tests``, ``PART=sanitize`` or ``PART=bench`` builds, and runs that one
alone. ``OUT`` is the folder for the results (default ``benchmarks/results``): the benchmark's file,
``gpu-check-<date>.json`` with the outcome of the parts, and ``logs/``. Exits with 0 if all is well,
1 if something failed, 2 without a GPU.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from . import environment

ROOT = environment.ROOT
# Seconds. All parts together end within nine minutes; the last one may have what others leave.
LIMITS = {"build": 60.0, "tests": 225.0, "sanitize": 90.0, "bench": 160.0}
MOST_FOR_BENCH = 300.0
START = time.monotonic()
# Tests of kernels in the emulator.
EMULATED = ("test_cuda", "test_cuda_covariance", "test_cuda_moments")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")

Outcome = dict[str, Any]


def build(_: Path, log: Path) -> Outcome:
    if not (ROOT / "csrc").is_dir():
        return {"ok": True, "note": "nothing to build: there is no csrc/"}
    # For this GPU alone, which is sooner done.
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major in (9, 10) else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return _process("build", command, log, RIFT_KERNELS_CUDA_ARCHS=architecture)


def tests(_: Path, log: Path) -> Outcome:
    """The whole suite on the GPU; an outcome without a single passed test is a failure."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Minutes that say nothing about this GPU.
    command += [f"--ignore=tests/{name}.py" for name in EMULATED]
    outcome = _process("tests", command, log, RIFT_TEST_DEVICE="cuda")
    counts = read_junit(report) if report.exists() else {"passed": 0}
    if outcome["ok"] and counts["passed"] == 0:
        outcome.update(ok=False, note="no test ran")
    return {**outcome, **counts}


def sanitize(_: Path, log: Path) -> Outcome:
    """Every kernel on small features under each of compute-sanitizer's tools, one after another."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"ok": True, "note": "not done: compute-sanitizer is not on PATH"}
    run = f"{shlex.quote(sys.executable)} -m benchmarks.exercise"
    # Once without a tool, which compiles the kernels and says whether they are right.
    commands = [run]
    commands += [
        f"{shlex.quote(sanitizer)} --tool {tool} --error-exitcode 9 {run}" for tool in SANITIZERS
    ]
    return _process("sanitize", ["bash", "-c", " && ".join(commands)], log)


def bench(out: Path, log: Path) -> Outcome:
    """The comparison; before it what is short and leaves no file, then what there is time for."""
    seconds = bench_limit(time.monotonic() - START)
    options = ["--profile", "gpu", "--device", "cuda", "--out", str(out)]
    budget = ["--budget", f"{min(seconds - 60, 150):.0f}"]
    commands = [["moments"], ["host"], ["run", *options, *budget]]
    if seconds >= 270:
        commands += [["step", *options], ["frontier", *options]]
    lines = [shlex.join([sys.executable, "-m", f"benchmarks.{c[0]}", *c[1:]]) for c in commands]
    return _process("bench", ["bash", "-c", " && ".join(lines)], log, limit=seconds)


def bench_limit(spent: float) -> float:
    left = sum(LIMITS.values()) - spent
    return max(LIMITS["bench"], min(MOST_FOR_BENCH, left))


PARTS = {"build": build, "tests": tests, "sanitize": sanitize, "bench": bench}


def read_junit(report: Path) -> dict[str, Any]:
    """Passed, failed, skipped, the names of what failed, and how often each reason to skip."""
    failed: list[str] = []
    reasons: dict[str, int] = {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            reason = skipped.get("message", "")
            reasons[reason] = reasons.get(reason, 0) + 1
    skips = sum(reasons.values())
    return {
        "passed": len(cases) - len(failed) - skips,
        "failed": len(failed),
        "skipped": skips,
        "failures": failed,
        "skip_reasons": reasons,
    }


def _process(
    part: str, command: list[str], log: Path, limit: float | None = None, **variables: str
) -> Outcome:
    """Run a command from the repository root, its output into ``log``, within its part's limit."""
    limit = limit or LIMITS[part]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            note = "" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            # Its children, too: compilers run in processes of their own.
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            note = f"stopped after {limit:.0f} s"
    seconds = round(time.monotonic() - start, 1)
    return {"ok": code == 0, "note": note, "seconds": seconds, "log": str(log)}


def _lines(part: str, outcome: Outcome) -> list[str]:
    """A part's summary; of one that failed, the end of its log as well."""
    state = "ok" if outcome["ok"] else "FAILED"
    if "failed" in outcome:
        state += ", {passed} passed, {failed} failed, {skipped} skipped".format(**outcome)
    if outcome["note"]:
        state += f": {outcome['note']}"
    lines = [f"{part:<8} {state}"]
    lines += [f"       failed: {name}" for name in outcome.get("failures", [])]
    lines += [f"       skipped {n}: {why}" for why, n in outcome.get("skip_reasons", {}).items()]
    if "log" in outcome:
        text = Path(outcome["log"]).read_text(encoding="utf-8", errors="replace")
        if part == "bench" or not outcome["ok"]:
            lines += text.splitlines()[-40:]
    return lines


def main() -> int:
    chosen = os.environ.get("PART", "all")
    if chosen not in ("all", "tests", "sanitize", "bench"):
        print(f"PART must be all, tests, sanitize or bench; got {chosen!r}")
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU that torch can use, and this machine has none.")
        return 2
    now = datetime.datetime.now(datetime.UTC)
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results")).resolve()
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for part, function in PARTS.items():
        if chosen in ("all", part) or part == "build":
            print(f"{part} ...", flush=True)
            outcomes[part] = function(out, logs / f"{part}.txt")
    summary = {
        "schema": "rift_kernels gpu-check 1",
        "environment": environment.describe(torch.device("cuda")),
        "parts": outcomes,
    }
    path = out / f"gpu-check-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for part, outcome in outcomes.items():
        print("\n".join(_lines(part, outcome)))
    print(f"wrote {path}")
    return 0 if all(outcome["ok"] for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
