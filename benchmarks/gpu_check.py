"""``python -m benchmarks.gpu_check``: what needs a GPU, the most telling first, and offline.

Installs nothing: this interpreter and what it has. One step after another, each a process with a
time limit: build the extension for this GPU, known answers, the benchmark of a few shapes, the
tests side by side, a few kernels under compute-sanitizer; then, if there is time, longer
benchmarks. All results lie in ``build/gpu-check``, written as they come, and so does
``gpu-check.json``, which says what is done: a further run goes on from there, as long as sources,
versions and the GPU are the same. ``--out FOLDER`` (or the variable OUT) keeps copies of all files
there while it runs.
``python -m benchmarks.precompile`` makes what saves it most of the time for compilers.

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
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import carried, command, environment, gpu_tests

ROOT = environment.ROOT
WORK = ROOT / "build" / "gpu-check"
SCHEMA = "rift_kernels gpu-check 2"
MINUTES = 9.0
POLL = 0.2
COPY_EVERY = 5.0

Outcome = dict[str, Any]


class Step(NamedTuple):
    """A command of this interpreter, with {names} of what ``Check`` fills in."""

    name: str
    command: str
    most: float  # seconds
    least: float = 5.0  # with fewer left it is not begun


_SANITIZE = "compute-sanitizer --tool {} --error-exitcode 9 {{python}} -m benchmarks.exercise --few"
# The first ones, up to SPARE, take nine minutes at most.
STEPS = (
    Step("build", "{python} setup.py build_ext --inplace", 75),
    Step(
        "check",
        "{python} -m rift_kernels check --json {work}/check.json --seconds {seconds} --jobs {jobs}",
        120,
    ),
    Step(
        "bench headline",
        "{python} -m benchmarks.run --profile headline --device cuda --out {work} "
        "--budget {seconds}",
        75,
        20,
    ),
    Step("bench host", "{python} -m benchmarks.host", 20),
    Step("bench moments", "{python} -m benchmarks.moments", 25),
    Step(
        "tests",
        "{python} -m pytest -p no:cacheprovider -p benchmarks.gpu_tests -q {workers} "
        "-o faulthandler_timeout=60 tests",
        165,
        15,
    ),
    Step("sanitize memcheck", _SANITIZE.format("memcheck"), 30),
    Step("sanitize racecheck", _SANITIZE.format("racecheck"), 30),
)
SPARE = (
    Step(
        "bench gpu",
        "{python} -m benchmarks.run --profile gpu --device cuda --out {work} --budget {seconds}",
        190,
        60,
    ),
    Step(
        "bench step", "{python} -m benchmarks.step --profile gpu --device cuda --out {work}", 90, 30
    ),
    Step(
        "bench frontier",
        "{python} -m benchmarks.frontier --profile gpu --device cuda --out {work}",
        90,
        30,
    ),
    Step("sanitize synccheck", _SANITIZE.format("synccheck"), 30),
    Step("sanitize initcheck", _SANITIZE.format("initcheck"), 30),
)
# Whatever compiles or starts there takes this much of a step's time before anything is measured.
START_SECONDS = 20


def fingerprint() -> str:
    """Of all that outcomes depend on: sources, versions, the GPU."""
    digest = hashlib.sha256()
    for folder, pattern in (
        ("rift_kernels", "*.py"), ("rift_kernels", "*.json"), ("csrc", "*"),
        ("tests", "*.py"), ("benchmarks", "*.py"),
    ):  # fmt: skip
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    digest.update(json.dumps(environment.versions()).encode())
    digest.update(torch.cuda.get_device_name().encode())
    return digest.hexdigest()


def architecture() -> str:
    """As RIFT_KERNELS_CUDA_ARCHS has it, of this GPU alone, which is sooner compiled."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major in (9, 10) else "")


class Check:
    """A run: what is done, how much time is left, and where it is written."""

    def __init__(self, work: Path, out: Path | None, end: float, jobs: int) -> None:
        self.work, self.out, self.end, self.jobs = work, out, end, jobs
        self.log, self.outcomes = work / "gpu-check.log", work / "tests.jsonl"
        self.path = work / "gpu-check.json"
        work.mkdir(parents=True, exist_ok=True)
        self.summary: dict[str, Any] = {
            "schema": SCHEMA,
            "fingerprint": fingerprint(),
            "environment": environment.describe(torch.device("cuda")),
            "steps": {},
        }
        if self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier.get("fingerprint") == self.summary["fingerprint"]:
                self.summary["steps"] = earlier["steps"]
            else:
                self.forget()

    def forget(self) -> None:
        """Begin from nothing."""
        self.summary["steps"] = {}
        for path in self.work.iterdir():
            if path.is_file():
                path.unlink()

    def run(self, steps: Sequence[Step]) -> bool:
        """Whether all are done, and well; those that spare time is for need not be done."""
        for step in steps:
            done = self.summary["steps"].get(step.name, {})
            if done.get("finished"):
                print(f"{step.name:<19} done before: {_state(done)}", flush=True)
                continue
            outcome = self._outcome(step)
            self._note(step, outcome)
            print("\n".join(_lines(step.name, outcome)), flush=True)
        outcomes = self.summary["steps"]
        return all(
            outcomes[step.name]["ok"] or (step in SPARE and not outcomes[step.name]["finished"])
            for step in steps
        )

    def _outcome(self, step: Step) -> Outcome:
        """Of running it, or why it cannot be run."""
        seconds = min(step.most, self.end - time.monotonic())
        if seconds < step.least:
            note = f"not begun: it needs {step.least:.0f} s, and {max(seconds, 0):.0f} s are left"
            return {"ok": False, "finished": False, "note": note}
        if step.name == "build" and (ready := self._built()):
            return {"ok": True, "finished": True, "note": ready}
        if step.command.startswith("compute-sanitizer") and not shutil.which("compute-sanitizer"):
            return {"ok": True, "finished": True, "note": "not done: there is no compute-sanitizer"}
        self._note(step, {"ok": False, "finished": False, "note": "under way"})
        print(f"{step.name} ...", flush=True)
        outcome = self._process(step, seconds)
        if step.name == "tests":
            outcome |= gpu_tests.counts(gpu_tests.read(self.outcomes))
            if outcome["ok"] and not outcome["passed"]:
                outcome |= {"ok": False, "note": "no test ran"}
        if "Device not supported" in outcome["tail"] and not outcome["ok"]:
            outcome |= {"ok": True, "note": "not done: compute-sanitizer refuses this machine"}
        return outcome

    def _built(self) -> str:
        """Why there is nothing to build, if so."""
        if not (ROOT / "csrc").is_dir():
            return "nothing to build: there is no csrc/"
        if find_spec("rift_kernels._C") is None or not carried.is_built(architecture()):
            return ""
        return "built before, of the same sources"

    def _words(self, step: Step, seconds: float) -> list[str]:
        workers = f"-n {self.jobs}" if find_spec("xdist") else ""
        names = {
            "python": sys.executable,
            "work": str(self.work),
            "seconds": str(max(int(seconds - START_SECONDS), 5)),
            "jobs": str(self.jobs),
            "workers": workers,
        }
        return [
            part
            for word in step.command.split()
            for part in (workers.split() if word == "{workers}" else [word.format(**names)])
        ]

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
            gpu_tests.VARIABLE: str(self.outcomes),
        }
        words, start = self._words(step, seconds), time.monotonic()
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
            try:
                code = self._wait(process, start + seconds)
            finally:
                # Its children, too: compilers run in processes of their own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        note = "" if code == 0 else f"exit status {code}"
        if code is None:
            note = f"stopped after {seconds:.0f} s"
        with self.log.open("rb") as log:
            log.seek(begin)
            tail = log.read().decode(errors="replace").splitlines()[-40:]
        return {
            "ok": code == 0,
            "finished": code is not None,
            "note": note,
            "seconds": round(time.monotonic() - start, 1),
            "tail": "\n".join(tail),
        }

    def _wait(self, process: subprocess.Popen[bytes], end: float) -> int | None:
        copied = 0.0
        while (code := process.poll()) is None and time.monotonic() < end:
            time.sleep(POLL)
            if time.monotonic() > copied + COPY_EVERY:
                self.copy()
                copied = time.monotonic()
        return code

    def _note(self, step: Step, outcome: Outcome) -> None:
        self.summary["steps"][step.name] = outcome
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)
        self.copy()

    def copy(self) -> None:
        """All files as they are now to the folder for copies."""
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for path in self.work.iterdir():
            copy = self.out / path.name
            if path.is_file() and (
                not copy.exists() or copy.stat().st_mtime_ns != path.stat().st_mtime_ns
            ):
                with contextlib.suppress(FileNotFoundError):  # a temporary one
                    shutil.copy2(path, copy)


def _state(outcome: Outcome) -> str:
    state = "ok" if outcome["ok"] else "FAILED"
    if "failed" in outcome:
        state += ", {passed} passed, {failed} failed, {skipped} skipped".format(**outcome)
    return f"{state}: {outcome['note']}" if outcome["note"] else state


def _lines(name: str, outcome: Outcome) -> list[str]:
    """A step's summary; of one that failed or measures, the end of its output as well."""
    took = f" ({outcome['seconds']} s)" if "seconds" in outcome else ""
    lines = [f"{name:<19} {_state(outcome)}{took}"]
    lines += [f"       failed: {test}" for test in outcome.get("failures", [])]
    lines += [f"       skipped {n}: {why}" for why, n in outcome.get("skip_reasons", {}).items()]
    if name.startswith(("bench", "check")) or not outcome["ok"]:
        lines += outcome.get("tail", "").splitlines()
    return lines


@contextlib.contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """Who is asked to end ends what it has started."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--minutes",
        type=command.positive,
        default=MINUTES,
        help="for all of it, default %(default)s",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="steps whose names begin so: tests, bench host"
    )
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--out", type=Path, help="a folder for copies; default: the variable OUT")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    steps = [
        step
        for step in (*STEPS, *SPARE)
        if options.only is None or step.name.startswith(tuple(options.only))
    ]
    if not steps:
        names = ", ".join(step.name for step in (*STEPS, *SPARE))
        parser.error(f"--only must be of {names}; got {' '.join(options.only)}")
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU that torch can use, and this machine has none.")
        return 2
    out = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    with _ended_by_a_signal():
        check = Check(WORK, out, end, options.jobs)
        if options.again:
            for step in steps:
                check.summary["steps"].pop(step.name, None)
                if step.name == "tests":
                    check.outcomes.unlink(missing_ok=True)
        carried.unpack(carried.ARCHIVE, carried.CACHE)
        good = check.run(steps)
    print(f"results are in {WORK}" + (f" and {out}" if out else ""))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
