"""``python -m tests.gpu.check``: checks and measures on a GPU, the most telling first, offline.

It installs nothing, and uses this interpreter and its packages. Each step is a process with a time
limit. The extension is built for this GPU; then come known answers, the benchmark of a few shapes,
the tests side by side, and a few kernels under compute-sanitizer. Longer benchmarks follow if time
is left. Results go into ``build/gpu-check`` as they come, and ``gpu-check.json`` there says what is
done. A later run goes on from there if sources, versions and the GPU are the same.
``--out FOLDER`` (or the variable OUT) keeps copies of all files there while it runs.
``python -m tests.gpu.precompile`` compiles beforehand.

Exits with 0 if all is well, 1 if something failed or was not done, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
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

from . import archive, suite

ROOT = environment.ROOT
WORK = ROOT / "build" / "gpu-check"
MINUTES = 9.0
COPY_EVERY = 5.0
# Compiling and starting take this much of a step's time before anything is measured.
START_SECONDS = 20

Outcome = dict[str, Any]
UNFINISHED: Outcome = {"ok": False, "finished": False}


class Step(NamedTuple):
    """A process with a time limit; ``Check.words`` fills in the {names} in its command."""

    name: str
    command: str
    most: float  # seconds
    least: float = 5.0  # with fewer seconds left, it does not begin
    spare: bool = False  # it need not be done


# All but the spare ones take nine minutes at most.
STEPS = (
    Step("build", "{python} setup.py build_ext --inplace", 75),
    Step(
        "check",
        "{python} -m rift_kernels check --json {work}/check.json --seconds {seconds} --jobs {jobs}",
        120,
    ),
    Step("bench headline", "{bench}.run --profile headline --budget {seconds} {on_gpu}", 75, 20),
    Step("bench host", "{bench}.host", 20),
    Step("bench kernels", "{bench}.kernel_times", 25),
    Step(
        "tests",
        "{python} -m pytest -p no:cacheprovider -p tests.gpu.suite -q {workers} "
        "-o faulthandler_timeout=60 tests",
        165,
        15,
    ),
    Step("sanitize memcheck", "compute-sanitizer --tool memcheck {exercise}", 30),
    Step("sanitize racecheck", "compute-sanitizer --tool racecheck {exercise}", 30),
    Step("bench gpu", "{bench}.run --profile gpu --budget {seconds} {on_gpu}", 190, 60, spare=True),
    Step("bench step", "{bench}.step --profile gpu {on_gpu}", 90, 30, spare=True),
    Step("bench frontier", "{bench}.frontier --profile gpu {on_gpu}", 90, 30, spare=True),
    Step("sanitize synccheck", "compute-sanitizer --tool synccheck {exercise}", 30, spare=True),
    Step("sanitize initcheck", "compute-sanitizer --tool initcheck {exercise}", 30, spare=True),
)
SOURCES = (
    *("rift_kernels/**/*.py", "rift_kernels/**/*.json", "csrc/**/*"),
    *("tests/**/*.py", "benchmarks/**/*.py"),
)


def fingerprint() -> str:
    """A digest of all that outcomes depend on: sources, versions, the GPU."""
    return archive.digest(ROOT, SOURCES, environment.versions(), torch.cuda.get_device_name())


def architecture() -> str:
    """The GPU's own, for RIFT_KERNELS_CUDA_ARCHS: one alone compiles sooner."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major in (9, 10) else "")


class Check:
    """A run: how much time is left, what is done, and where it is written."""

    def __init__(self, work: Path, out: Path | None, end: float, jobs: int) -> None:
        self.work, self.out, self.end, self.jobs = work, out, end, jobs
        self.log, self.outcomes = work / "gpu-check.log", work / "tests.jsonl"
        self.path = work / "gpu-check.json"
        self.steps: dict[str, Outcome] = {}
        self.about = {
            "schema": "rift_kernels gpu-check 2",
            "fingerprint": fingerprint(),
            "environment": vars(environment.describe(torch.device("cuda"))),
        }
        if self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier.get("fingerprint") == self.about["fingerprint"]:
                self.steps = earlier["steps"]
            else:
                shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)

    def run(self, steps: Sequence[Step], again: bool) -> bool:
        """Whether all are done and good; spare ones need not be done."""
        for step in steps if again else ():
            self.steps.pop(step.name, None)
        for step in steps:
            done = self.steps.get(step.name)
            if done and done["finished"]:
                print(f"{step.name:<19} done before: {_state(done)}", flush=True)
            else:
                self._write(step, self._outcome(step))
                print(_report(step.name, self.steps[step.name]), flush=True)
        outcomes = [(step, self.steps[step.name]) for step in steps]
        return all(o["ok"] or (step.spare and not o["finished"]) for step, o in outcomes)

    def _outcome(self, step: Step) -> Outcome:
        """The outcome of running a step, or why it does not run."""
        seconds = min(step.most, self.end - time.monotonic())
        if seconds < step.least:
            left = max(seconds, 0)
            note = f"not begun: it needs {step.least:.0f} s, and {left:.0f} s are left"
            return {**UNFINISHED, "note": note}
        if needless := _needless(step):
            return {"ok": True, "finished": True, "note": needless}
        if step.name == "tests" and step.name not in self.steps:
            self.outcomes.unlink(missing_ok=True)
        self._write(step, {**UNFINISHED, "note": "under way"})
        print(f"{step.name} ...", flush=True)
        outcome = self._process(step, seconds)
        if step.name == "tests":
            outcome |= suite.counts(suite.read(self.outcomes))
            if outcome["ok"] and not outcome["passed"]:
                outcome |= {"ok": False, "note": "no test ran"}
        if "Device not supported" in outcome["tail"] and not outcome["ok"]:
            outcome |= {"ok": True, "note": "not done: compute-sanitizer refuses this machine"}
        return outcome

    def words(self, step: Step, seconds: float) -> list[str]:
        """The command line of a step."""
        python, work = shlex.quote(sys.executable), shlex.quote(str(self.work))
        line = step.command.format(
            python=python,
            work=work,
            seconds=max(int(seconds - START_SECONDS), 5),
            jobs=self.jobs,
            workers=f"-n {self.jobs}" if find_spec("xdist") else "",
            bench=f"{python} -m benchmarks",
            on_gpu=f"--device cuda --out {work}",
            exercise=f"--error-exitcode 9 {python} -m tests.gpu.exercise --few",
        )
        return shlex.split(line)

    def _process(self, step: Step, seconds: float) -> Outcome:
        """Run it from the repository's root, its output at the end of the log."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "TRITON_CACHE_DIR": str(ROOT / archive.CACHE),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "RIFT_TEST_DEVICE": "cuda",
            "RIFT_KERNELS_CUDA_ARCHS": architecture(),
            "OMP_NUM_THREADS": "1",  # processes side by side have a processor each
            suite.VARIABLE: str(self.outcomes),
        }
        words, start = self.words(step, seconds), time.monotonic()
        with self.log.open("ab") as log:
            log.write(f"\n== {step.name}: {' '.join(words)}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                words, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True
            )
            try:
                while process.poll() is None and (left := start + seconds - time.monotonic()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(left, COPY_EVERY))
                    self._copy()
                code = process.poll()
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
            "note": "" if code == 0 else note,
            "seconds": round(time.monotonic() - start, 1),
            "tail": "\n".join(tail),
        }

    def _write(self, step: Step, outcome: Outcome) -> None:
        self.steps[step.name] = outcome
        temporary = self.path.with_suffix(".new")
        text = json.dumps({**self.about, "steps": self.steps}, indent=1)
        temporary.write_text(f"{text}\n", encoding="utf-8")
        temporary.replace(self.path)
        self._copy()

    def _copy(self) -> None:
        """Copy what has changed to the folder for copies."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for path in filter(Path.is_file, self.work.iterdir()):
            copy = self.out / path.name
            with contextlib.suppress(FileNotFoundError):  # a temporary one
                if not copy.exists() or copy.stat().st_mtime_ns != path.stat().st_mtime_ns:
                    shutil.copy2(path, copy)


def _needless(step: Step) -> str:
    """Why there is nothing to do, or "" if there is something."""
    if step.command.startswith("compute-sanitizer") and not shutil.which("compute-sanitizer"):
        return "not done: there is no compute-sanitizer"
    if step.name == "build" and not (ROOT / "csrc").is_dir():
        return "nothing to build: there is no csrc/"
    if step.name == "build" and archive.is_built(ROOT, architecture()):
        return "built before, of the same sources"
    return ""


def _state(outcome: Outcome) -> str:
    state = "ok" if outcome["ok"] else "FAILED"
    if "failed" in outcome:
        state += ", {passed} passed, {failed} failed, {skipped} skipped".format(**outcome)
    return f"{state}: {outcome['note']}" if outcome["note"] else state


def _report(name: str, outcome: Outcome) -> str:
    """A step's summary, and the end of its output if it failed or measures."""
    took = f" ({outcome['seconds']} s)" if "seconds" in outcome else ""
    lines = [f"{name:<19} {_state(outcome)}{took}"]
    lines += [f"       failed: {test}" for test in outcome.get("failures", [])]
    lines += [f"       skipped {n}: {why}" for why, n in outcome.get("skip_reasons", {}).items()]
    if name.startswith(("bench", "check")) or not outcome["ok"]:
        lines += outcome.get("tail", "").splitlines()
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=command.positive, default=MINUTES, help="for all of it (%(default)s)")
    add("--only", nargs="+", metavar="WORD", default=[""], help="steps whose names begin so")
    add("--again", action="store_true", help="also what is done")
    add("--out", type=Path, default=os.environ.get("OUT") or None, help="for copies (OUT)")
    add("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    steps = [step for step in STEPS if step.name.startswith(tuple(options.only))]
    if not steps:
        names = ", ".join(step.name for step in STEPS)
        parser.error(f"--only must be of {names}; got {' '.join(options.only)}")
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU that torch can use, and this machine has none.")
        return 2
    check = Check(WORK, options.out, end, options.jobs)
    archive.unpack(ROOT)
    good = check.run(steps, options.again)
    print(f"results are in {WORK}" + (f" and {options.out}" if options.out else ""))
    return 0 if good else 1


if __name__ == "__main__":
    # A process that is asked to end ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
