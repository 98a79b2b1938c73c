"""``python -m tests.gpu.check``: what needs a GPU, the most telling first, and offline.

Installs nothing: this interpreter and what it has. One step after another, each a process with a
time limit: build the extension for this GPU, known answers, the benchmark of a few shapes, the
tests side by side, a few kernels under compute-sanitizer; then, if there is time, longer
benchmarks. All results lie in ``build/gpu-check``, written as they come, and so does
``gpu-check.json``, which says what is done: a further run goes on from there, as long as sources,
versions and the GPU are the same. ``--out FOLDER`` (or the variable OUT) keeps copies of all files
there while it runs. ``python -m tests.gpu.precompile`` compiles beforehand.

Exits with 0 if all is well, 1 if something failed or was not done, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import command, environment

from . import carried, suite

ROOT = environment.ROOT
WORK = ROOT / "build" / "gpu-check"
SCHEMA = "rift_kernels gpu-check 2"
MINUTES = 9.0
POLL, COPY_EVERY = 0.2, 5.0
# Compiling and starting take this much of a step's time before anything is measured.
START_SECONDS = 20

Outcome = dict[str, Any]


class Step(NamedTuple):
    """A command of this interpreter, with {names} that ``Check`` fills in."""

    name: str
    command: str
    most: float  # seconds
    least: float = 5.0  # with fewer left it is not begun


def _benchmark(name: str, options: str, most: float, least: float) -> Step:
    command = f"{{python}} -m benchmarks.{options} --device cuda --out {{work}}"
    return Step(name, command, most, least)


def _sanitizer(tool: str) -> Step:
    options = f"--tool {tool} --error-exitcode 9 {{python}} -m tests.gpu.exercise --few"
    return Step(f"sanitize {tool}", f"compute-sanitizer {options}", 30)


# These take nine minutes at most.
STEPS = (
    Step("build", "{python} setup.py build_ext --inplace", 75),
    Step(
        "check",
        "{python} -m rift_kernels check --json {work}/check.json --seconds {seconds} --jobs {jobs}",
        120,
    ),
    _benchmark("bench headline", "run --profile headline --budget {seconds}", 75, 20),
    Step("bench host", "{python} -m benchmarks.host", 20),
    Step("bench moments", "{python} -m benchmarks.moments", 25),
    Step(
        "tests",
        "{python} -m pytest -p no:cacheprovider -p tests.gpu.suite -q {workers} "
        "-o faulthandler_timeout=60 tests",
        165,
        15,
    ),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
)
# These run if there is time.
SPARE = (
    _benchmark("bench gpu", "run --profile gpu --budget {seconds}", 190, 60),
    _benchmark("bench step", "step --profile gpu", 90, 30),
    _benchmark("bench frontier", "frontier --profile gpu", 90, 30),
    _sanitizer("synccheck"),
    _sanitizer("initcheck"),
)


def fingerprint() -> str:
    """A digest of all that outcomes depend on: sources, versions, the GPU."""
    digest = hashlib.sha256()
    for pattern in ("rift_kernels/**/*.py", "rift_kernels/**/*.json", "csrc/**/*", "tests/**/*.py",
                    "benchmarks/**/*.py"):  # fmt: skip
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    digest.update(json.dumps([environment.versions(), torch.cuda.get_device_name()]).encode())
    return digest.hexdigest()


def architecture() -> str:
    """The GPU's, as in RIFT_KERNELS_CUDA_ARCHS: one alone is compiled sooner."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major in (9, 10) else "")


class Check:
    """A run: what is done, how much time is left, and where it is written."""

    def __init__(self, work: Path, out: Path | None, end: float, jobs: int) -> None:
        self.work, self.out, self.end, self.jobs = work, out, end, jobs
        self.log, self.outcomes = work / "gpu-check.log", work / "tests.jsonl"
        self.path = work / "gpu-check.json"
        work.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, Outcome] = {}
        self._about = {
            "schema": SCHEMA,
            "fingerprint": fingerprint(),
            "environment": vars(environment.describe(torch.device("cuda"))),
        }
        if self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier.get("fingerprint") == self._about["fingerprint"]:
                self.steps = earlier["steps"]
            else:
                for path in filter(Path.is_file, work.iterdir()):
                    path.unlink()

    def forget(self, steps: Sequence[Step]) -> None:
        """Begin these anew."""
        for step in steps:
            self.steps.pop(step.name, None)
            if step.name == "tests":
                self.outcomes.unlink(missing_ok=True)

    def run(self, steps: Sequence[Step]) -> bool:
        """Whether all are done and good; those of SPARE need not be done."""
        for step in steps:
            done = self.steps.get(step.name, {})
            if done.get("finished"):
                print(f"{step.name:<19} done before: {_state(done)}", flush=True)
                continue
            outcome = self._outcome(step)
            self._note(step, outcome)
            print("\n".join(_lines(step.name, outcome)), flush=True)
        spare = {step.name for step in SPARE if not self.steps.get(step.name, {}).get("finished")}
        return all(self.steps[step.name]["ok"] or step.name in spare for step in steps)

    def _outcome(self, step: Step) -> Outcome:
        """The outcome of running a step, or why it cannot be run."""
        seconds = min(step.most, self.end - time.monotonic())
        if seconds < step.least:
            note = f"not begun: it needs {step.least:.0f} s, and {max(seconds, 0):.0f} s are left"
            return {"ok": False, "finished": False, "note": note}
        needless = self._needless(step)
        if needless:
            return {"ok": True, "finished": True, "note": needless}
        self._note(step, {"ok": False, "finished": False, "note": "under way"})
        print(f"{step.name} ...", flush=True)
        outcome = self._process(step, seconds)
        if step.name == "tests":
            outcome |= suite.counts(suite.read(self.outcomes))
            if outcome["ok"] and not outcome["passed"]:
                outcome |= {"ok": False, "note": "no test ran"}
        if "Device not supported" in outcome["tail"] and not outcome["ok"]:
            outcome |= {"ok": True, "note": "not done: compute-sanitizer refuses this machine"}
        return outcome

    def _needless(self, step: Step) -> str:
        """The reason why there is nothing to do, or empty."""
        if step.command.startswith("compute-sanitizer") and not shutil.which("compute-sanitizer"):
            return "not done: there is no compute-sanitizer"
        if step.name == "build" and not (ROOT / "csrc").is_dir():
            return "nothing to build: there is no csrc/"
        built = find_spec("rift_kernels._C") is not None and carried.is_built(architecture())
        return "built before, of the same sources" if step.name == "build" and built else ""

    def words(self, step: Step, seconds: float) -> list[str]:
        """The command line of a step."""
        values = {
            "python": sys.executable,
            "work": self.work,
            "seconds": max(int(seconds - START_SECONDS), 5),
            "jobs": self.jobs,
        }
        workers = ["-n", str(self.jobs)] if find_spec("xdist") else []
        words: list[str] = []
        for word in step.command.split():
            words += workers if word == "{workers}" else [word.format(**values)]
        return words

    def _process(self, step: Step, seconds: float) -> Outcome:
        """Run it from the repository's root, its output at the end of the log."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "RIFT_TEST_DEVICE": "cuda",
            "RIFT_KERNELS_CUDA_ARCHS": architecture(),
            # Processes side by side have a processor each.
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(carried.CACHE)),
            suite.VARIABLE: str(self.outcomes),
        }
        words, start = self.words(step, seconds), time.monotonic()
        with self.log.open("ab") as log:
            log.write(f"\n== {step.name}: {' '.join(words)}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            copied = start
            try:
                while (code := process.poll()) is None and time.monotonic() < start + seconds:
                    time.sleep(POLL)
                    if time.monotonic() > copied + COPY_EVERY:
                        self._copy()
                        copied = time.monotonic()
            finally:
                # Its children, too: compilers run in processes of their own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        note = f"stopped after {seconds:.0f} s" if code is None else f"exit status {code}"
        tail = self.log.read_bytes()[begin:].decode(errors="replace").splitlines()[-40:]
        return {
            "ok": code == 0,
            "finished": code is not None,
            "note": note if code != 0 else "",
            "seconds": round(time.monotonic() - start, 1),
            "tail": "\n".join(tail),
        }

    def _note(self, step: Step, outcome: Outcome) -> None:
        self.steps[step.name] = outcome
        temporary = self.path.with_suffix(".new")
        text = json.dumps({**self._about, "steps": self.steps}, indent=1)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        temporary.replace(self.path)
        self._copy()

    def _copy(self) -> None:
        """Copy all files, as they are now, to the folder for copies."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for path in filter(Path.is_file, self.work.iterdir()):
            copy = self.out / path.name
            with contextlib.suppress(FileNotFoundError):  # a temporary one
                if not copy.exists() or copy.stat().st_mtime_ns != path.stat().st_mtime_ns:
                    shutil.copy2(path, copy)


def _state(outcome: Outcome) -> str:
    state = "ok" if outcome["ok"] else "FAILED"
    if "failed" in outcome:
        state += ", {passed} passed, {failed} failed, {skipped} skipped".format(**outcome)
    return f"{state}: {outcome['note']}" if outcome["note"] else state


def _lines(name: str, outcome: Outcome) -> list[str]:
    """A step's summary; the end of its output as well, if it failed or measures."""
    took = f" ({outcome['seconds']} s)" if "seconds" in outcome else ""
    lines = [f"{name:<19} {_state(outcome)}{took}"]
    lines += [f"       failed: {test}" for test in outcome.get("failures", [])]
    lines += [f"       skipped {n}: {why}" for why, n in outcome.get("skip_reasons", {}).items()]
    if name.startswith(("bench", "check")) or not outcome["ok"]:
        lines += outcome.get("tail", "").splitlines()
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument(
        "--minutes", type=command.positive, default=MINUTES, help="for all of it (%(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[""],
        help="steps whose names begin so: tests, bench host",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or None,
        help="a folder for copies; default: the variable OUT",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    every = (*STEPS, *SPARE)
    steps = [step for step in every if step.name.startswith(tuple(options.only))]
    if not steps:
        names = ", ".join(step.name for step in every)
        parser.error(f"--only must be of {names}; got {' '.join(options.only)}")
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU that torch can use, and this machine has none.")
        return 2
    check = Check(WORK, options.out, end, options.jobs)
    check.forget(steps if options.again else [])
    carried.unpack(carried.ARCHIVE, carried.CACHE)
    # A process that is asked to end ends what it has started.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        good = check.run(steps)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"results are in {WORK}" + (f" and {options.out}" if options.out else ""))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
