"""``python -m rift_kernels check``: every kernel on known answers, in separate processes.

The cases that ``auto`` tests come first, in all families and dtypes, then all others that the
kernels can compute. The result file is rewritten after each case, so a check that is interrupted
leaves what it found; ``benchmarks.report`` reads it. ``auto`` uses the verdicts.

The exit status is 0 if all cases agree, and 1 if one does not. It is 2 if none is wrong but some
could not be tried, for lack of a GPU, of its memory or of time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rift_kernels._version import __version__
from rift_kernels.dispatch import availability
from rift_kernels.trust import examination, known_answers, verdicts
from rift_kernels.trust.examination import Report, Task, verdicts_of
from rift_kernels.trust.verdicts import Kernels, Verdict

SCHEMA = "rift_kernels check 1"
DEFAULT = Path("rift_kernels_check.json")
UNKNOWN = "unknown"
STATES = {True: "agrees", False: "WRONG", None: "not tried"}


def reasons(device: torch.device) -> dict[str, str | None]:
    """Why each backend with kernels cannot run on ``device``; None if it can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return {backend: availability.reason_against(backend) for backend in known_answers.FAMILIES}
    problem = availability.Problem("cka", (True,), 16, 16)
    return {
        backend: availability.reason_against(backend, device, (torch.bfloat16,), problem)
        for backend in known_answers.FAMILIES
    }


def tasks(backends: Sequence[str], words: Sequence[str], quick: bool) -> list[Task]:
    """The tasks, in order: those of ``auto`` first."""
    chosen = [
        kernels
        for kernels in known_answers.ALL
        if kernels.backend in backends and all(word in str(kernels) for word in words)
    ]
    first, every = (
        [
            (kernels, case)
            for kernels in chosen
            for case in known_answers.cases_of(kernels, thorough)
        ]
        for thorough in (False, True)
    )
    rest = [] if quick else [pair for pair in every if pair not in first]
    return [(kernels, known_answers.key(case)) for kernels, case in (*first, *rest)]


def environment(identities: dict[str, verdicts.Identity]) -> dict[str, Any]:
    """The machine and the software, in the format of the benchmarks' results."""
    machine = next(iter(identities.values()), {"gpu": "none", "driver": UNKNOWN})
    gpu = None if machine["gpu"] == "none" else machine["gpu"]
    processor = platform.processor() or platform.machine() or UNKNOWN
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": gpu or processor,
        "cpu": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": machine["driver"] if gpu else None,
        "clocks": UNKNOWN,
        "system": f"{platform.system()} {platform.machine()}",
        "commit": UNKNOWN,
        "dirty": None,
        "versions": {
            "rift_kernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "triton": machine.get("triton"),
        },
    }


def _flat(report: Report) -> dict[str, Any]:
    kernels, *_ = report
    return {
        **kernels._asdict(),
        **{name: value for name, value in report._asdict().items() if name != "kernels"},
    }


def _side_by_side(
    tasks: Sequence[Task], device: torch.device, limit: float, seconds: float, jobs: int
) -> Iterator[tuple[Report, dict[str, verdicts.Identity]]]:
    """The reports of concurrent examinations, each of different kernels, and their machine."""
    results: queue.SimpleQueue[tuple[Report, dict[str, verdicts.Identity]]] = queue.SimpleQueue()
    chosen = list(dict.fromkeys(kernels for kernels, _ in tasks))

    def examine(share: Sequence[Kernels]) -> None:
        own = [task for task in tasks if task[0] in share]
        running = examination.Examination(own, device, limit, seconds)
        for report in running:
            results.put((report, running.identities))

    for i in range(jobs):
        threading.Thread(target=examine, args=(chosen[i::jobs],), daemon=True).start()
    for _ in tasks:
        yield results.get()


class Check:
    """A running check: its reports, and the file that holds them."""

    def __init__(self, path: Path, device: torch.device, quick: bool) -> None:
        self._path, self._device = path, device
        self._quick, self._start = quick, time.monotonic()
        self._reasons = reasons(device)
        self._reports: list[Report] = []
        self._identities: dict[str, verdicts.Identity] = {}

    def run(self, words: Sequence[str], limit: float, seconds: float, jobs: int) -> int:
        """Try everything, and return the exit status."""
        runnable = [backend for backend, reason in self._reasons.items() if reason is None]
        all_tasks = tasks(runnable, words, self._quick)
        for backend, reason in self._reasons.items():
            if reason is not None:
                print(f"{backend}: not tried: {reason}")
        self._write(complete=not all_tasks)
        for report, identities in _side_by_side(all_tasks, self._device, limit, seconds, jobs):
            self._identities |= identities
            self._reports.append(report)
            if report.good is not True:
                print(f"{report.kernels}: {STATES[report.good]}: {report.seen}", flush=True)
            self._remember(report)
            self._write(complete=len(self._reports) == len(all_tasks))
        print(self.table())
        print(f"wrote {self._path}")
        states = {report.good for report in self._reports}
        return 1 if False in states else 2 if None in states or not states else 0

    def _remember(self, report: Report) -> None:
        """Store a verdict for ``auto`` after all of its cases, and at once if one is wrong."""
        kernels = report.kernels
        reports = self._reports_on(kernels)
        good, seen = verdicts_of(reports)[kernels]
        is_enough = len(reports) >= len(known_answers.cases_of(kernels, False))
        if report.good is False or (good and is_enough):
            verdicts.write(self._identities[kernels.backend], kernels, Verdict(bool(good), seen))

    def _reports_on(self, kernels: Kernels) -> list[Report]:
        return [report for report in self._reports if report.kernels == kernels]

    def result(self, complete: bool) -> dict[str, Any]:
        """The content of the result file so far."""
        return {
            "schema": SCHEMA,
            "profile": "quick" if self._quick else "full",
            "environment": environment(self._identities),
            "seconds": round(time.monotonic() - self._start, 1),
            "complete": complete,
            "backends": [
                {"name": name, "reason": reason} for name, reason in self._reasons.items()
            ],
            "kernels": [
                {**kernels._asdict(), "good": good, "seen": seen}
                for kernels, (good, seen) in verdicts_of(self._reports).items()
            ],
            "cases": [_flat(report) for report in self._reports],
        }

    def _write(self, complete: bool) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(self.result(complete), indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def table(self) -> str:
        """One line for the kernels of each family and dtype."""
        lines = [
            f"{'kernels':<36} {'agree':>8}  {'value off by':>12}  {'gradient':>8}  {'seconds':>7}"
        ]
        for kernels in dict.fromkeys(report.kernels for report in self._reports):
            lines.append(self._line(kernels))
        return "\n".join(lines)

    def _line(self, kernels: Kernels) -> str:
        reports = self._reports_on(kernels)
        good = sum(report.good is True for report in reports)
        values = [r.value_error for r in reports if r.value_error is not None]
        gradients = [r.gradient_error for r in reports if r.gradient_error is not None]
        seconds = sum(report.seconds or 0.0 for report in reports)
        value, gradient = (f"{max(e):.0e}" if e else "-" for e in (values, gradients))
        count = f"{good}/{len(reports)}"
        return f"{kernels!s:<36} {count:>8}  {value:>12}  {gradient:>8}  {seconds:>7.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m rift_kernels check", description=__doc__)
    parser.add_argument("--json", type=Path, default=DEFAULT, help="the result file (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD",
        help="only kernels whose name, such as triton/gram_cka/bfloat16, contains all these words",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="only the cases that auto tests")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for the whole check")
    parser.add_argument(
        "--limit", type=float, default=examination.LIMIT, help="seconds per case (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that share the GPU (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {options.jobs}")
    check = Check(options.json, options.device, options.quick)
    return check.run(options.only, options.limit, options.seconds, options.jobs)
