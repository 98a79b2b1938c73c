"""Processes that run kernels on known answers, so that a crash or a hang does no harm here.

Each is ``python -m rift_kernels.commands.trial``. It announces every case before it begins, so that
its parent knows what was running when it died or fell silent.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import verdicts
from .verdicts import Kernels

# Seconds that a process may take to import torch and reach the GPU, and then to compile and run a
# case.
START = 120.0
LIMIT = 300.0
MODULE = "rift_kernels.commands.trial"
MARK = f"{MODULE} "  # begins each line of that process that is meant for this one

Task = tuple[Kernels, str]  # kernels, and the key of a case
_logger = logging.getLogger("rift_kernels")


class Report(NamedTuple):
    """The outcome of a case; see :class:`rift_kernels.commands.trial.Outcome`."""

    kernels: Kernels
    case: str
    good: bool | None
    seen: str = ""
    value_error: float | None = None
    gradient_error: float | None = None
    seconds: float | None = None


class Examination:
    """Runs tasks in separate processes; iterating yields a report for each.

    Args:
        tasks: what to run, in order.
        device: the GPU.
        limit: seconds that a process may be silent once it has started.
        seconds: for all tasks; those that are left then count as not tried.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        device: torch.device,
        limit: float | None = None,
        seconds: float = float("inf"),
    ) -> None:
        self._waiting = deque(tasks)
        self._device = device
        self._limit = LIMIT if limit is None else limit
        self._end = time.monotonic() + seconds
        self.identities: dict[str, verdicts.Identity] = {}

    def __iter__(self) -> Iterator[Report]:
        while self._waiting:
            yield from self._one_process()

    def _one_process(self) -> Iterator[Report]:
        """The reports of one process until it ends; at least one."""
        try:
            process = _Process(self._device, self._waiting)
        except (OSError, ValueError) as error:
            yield from self._give_up(f"no process could be started: {error}")
            return
        started, in_case, count = False, False, len(self._waiting)
        with process:
            while self._waiting:
                seconds = min(self._limit if started else START, self._end - time.monotonic())
                event = process.event(seconds)
                if event is None:
                    break
                if event["event"] == "started":
                    started, self.identities = True, self.identities | event["identities"]
                in_case = event["event"] == "case"
                if event["event"] == "outcome":
                    self._waiting.popleft()
                    del event["event"]
                    yield Report(**{**event, "kernels": Kernels(*event["kernels"])})
            else:
                return
            good, seen = process.end()
        if not good and time.monotonic() >= self._end:
            yield from self._give_up("out of time")
        elif not started or (not in_case and len(self._waiting) == count):
            yield from self._give_up(seen)
        elif in_case:
            kernels, case = self._waiting.popleft()
            yield Report(kernels, case, good, f"{case.partition(': ')[2]}: {seen}")
            yield from self._give_up(f"not tried after {case}", kernels)

    def _give_up(self, reason: str, kernels: Kernels | None = None) -> Iterator[Report]:
        """Report the remaining tasks, or those of some kernels, as not tried."""
        dropped = [task for task in self._waiting if kernels in (None, task[0])]
        self._waiting = deque(task for task in self._waiting if task not in dropped)
        for task in dropped:
            yield Report(*task, None, reason)


class _Process:
    """A process that runs kernels, and its output."""

    def __init__(self, device: torch.device, tasks: Iterable[Task]) -> None:
        if not sys.executable:
            raise ValueError("this Python does not know its executable")
        # -P: the current folder is not searched unless this process searches it as well.
        command = [sys.executable, "-P", "-m", MODULE, str(device), json.dumps(list(tasks))]
        path = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._other: deque[str] = deque(maxlen=20)
        self._late = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def event(self, seconds: float) -> dict[str, Any] | None:
        """The next event; None if the process has ended or sends none in time."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self._late = True
                return None
            if line is None:
                return None
            if line.startswith(MARK):
                event: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return event
            if line.strip():
                self._other.append(line.strip())

    def end(self) -> tuple[bool | None, str]:
        """Why no event came, as a report's ``good`` and ``seen``."""
        if self._late:
            self._kill()
            return False, "never returned"
        code = self._process.wait()
        last_line = f": {self._other[-1][:300]}" if self._other else ""
        if code == -signal.SIGKILL:
            return None, "the process was killed, perhaps for lack of memory"
        if code < 0:
            return False, f"the process was ended by {signal.Signals(-code).name}"
        return False, f"the process ended with status {code}{last_line}"

    def _kill(self) -> None:
        """Kill the process and its compilers."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (AttributeError, OSError):
            self._process.kill()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # It has finished its tasks or is no longer needed.
            self._kill()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            _logger.warning("process %d, which tested kernels, does not end", self._process.pid)


def verdicts_of(reports: Iterable[Report]) -> dict[Kernels, tuple[bool | None, str]]:
    """``good`` and ``seen`` of each kernels' worst case: wrong, else untried, else right."""
    worst: dict[Kernels, tuple[bool | None, str]] = {}
    for report in reports:
        good, seen = worst.get(report.kernels, (True, ""))
        if (good is True and report.good is not True) or (good is None and report.good is False):
            good, seen = report.good, report.seen
        worst[report.kernels] = good, seen
    return worst
