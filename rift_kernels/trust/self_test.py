"""What ``auto`` trusts: kernels that were seen to work on this GPU, with this software.

The first time that kernels would be used, a process of its own runs them on known answers: what
crashes or never returns there takes nothing with it. The verdict is kept on disk. What could not be
tried, because the GPU has no room or takes no second process, is not used either, and is tried
again by the next process. ``python -m rift_kernels check`` says more, at any time.
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
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import known_answers, verdicts
from .verdicts import Kernels, Verdict

ENVIRONMENT_VARIABLE = "RIFT_KERNELS_SELF_TEST"
SETTINGS = {
    "0": "use kernels without a test",
    "1": "test kernels once (the default)",
    "always": "test kernels once a process",
}
# Seconds: until a process has torch and a GPU; without a word from then on, which is to compile and
# run a case; of waiting for other processes.
START = 120.0
LIMIT = 300.0
WAIT = 900.0
REPORT = "python -m rift_kernels check"
MODULE = "rift_kernels.commands.trial"
_MARK = f"{MODULE} "

Task = tuple[Kernels, str]
_logger = logging.getLogger("rift_kernels")


def setting() -> str:
    """What RIFT_KERNELS_SELF_TEST says.

    Raises:
        ValueError: it is none of :data:`SETTINGS`.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if value not in SETTINGS:
        meanings = ", ".join(f"{name!r} ({what})" for name, what in SETTINGS.items())
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {meanings}; got {value!r}")
    return value


class Report(NamedTuple):
    """What became of a case; see :class:`rift_kernels.commands.trial.Outcome`."""

    kernels: Kernels
    case: str
    good: bool | None
    seen: str = ""
    value_error: float | None = None
    gradient_error: float | None = None
    seconds: float | None = None


class Examination:
    """Tasks tried in processes of their own; iterating gives the reports, one by one.

    Args:
        tasks: kernels and the key of a case.
        device: the GPU.
        limit: seconds that a process may go without a word, once it has begun.
        seconds: for all of them; what is left then could not be tried.
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
        """The reports that a process lives to make; at least one."""
        try:
            process = _Process(self._device, self._waiting)
        except (OSError, ValueError) as error:
            yield from self._give_up(f"no process could be started: {error}")
            return
        started, current, count = False, False, len(self._waiting)
        with process:
            while self._waiting:
                left = min(self._limit if started else START, self._end - time.monotonic())
                event = process.event(left)
                if event is None:
                    break
                if event["event"] == "started":
                    started, self.identities = True, self.identities | event["identities"]
                current = event["event"] == "case"
                if event["event"] == "outcome":
                    self._waiting.popleft()
                    del event["event"]
                    yield Report(**{**event, "kernels": Kernels(*event["kernels"])})
            else:
                return
            good, seen = process.end()
        if not good and time.monotonic() >= self._end:
            yield from self._give_up("out of time")
        elif not started or (not current and len(self._waiting) == count):
            yield from self._give_up(seen)
        elif current:
            kernels, case = self._waiting.popleft()
            yield Report(kernels, case, good, f"{case.partition(': ')[2]}: {seen}")
            yield from self._give_up(f"not tried after {case}", kernels)

    def _give_up(self, why: str, kernels: Kernels | None = None) -> Iterator[Report]:
        """On what is left, or what is left of some kernels."""
        left = [task for task in self._waiting if kernels in (None, task[0])]
        self._waiting = deque(task for task in self._waiting if task not in left)
        for task in left:
            yield Report(*task, None, why)


class _Process:
    """A process that tries kernels, and what it says."""

    def __init__(self, device: torch.device, tasks: Iterable[Task]) -> None:
        if not sys.executable:
            raise ValueError("this Python has no interpreter of its own")
        # -P: what lies in the current folder is not imported unless it is here, too.
        command = [sys.executable, "-P", "-m", MODULE, str(device), json.dumps(list(tasks))]
        variables = {
            **os.environ,
            ENVIRONMENT_VARIABLE: "0",
            "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path),
        }
        self._process = subprocess.Popen(
            command,
            env=variables,
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
        """The next one, or None where none comes any more, or none in time."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self._late = True
                return None
            if line is None:
                return None
            if line.startswith(_MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                return found
            if line.strip():
                self._other.append(line.strip())

    def end(self) -> tuple[bool | None, str]:
        """Why there is no event: a report's ``good`` and ``seen``."""
        if self._late:
            self._kill()
            return False, "never returned"
        code = self._process.wait()
        said = f": {self._other[-1][:300]}" if self._other else ""
        if code == -signal.SIGKILL:
            return None, "the process was killed, for lack of memory maybe"
        if code < 0:
            return False, f"the process ended by {signal.Signals(-code).name}"
        return False, f"the process ended with status {code}{said}"

    def _kill(self) -> None:
        """It and its compilers."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (AttributeError, OSError):
            self._process.kill()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # Done with its tasks, or not wanted any more.
            self._kill()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            _logger.warning("a process that tries kernels, %d, does not end", self._process.pid)


def verdicts_of(reports: Iterable[Report]) -> dict[Kernels, tuple[bool | None, str]]:
    """Of kernels: good if all cases were, else what was seen first; None if that says nothing."""
    found: dict[Kernels, tuple[bool | None, str]] = {}
    for report in reports:
        good, seen = found.get(report.kernels, (True, ""))
        # Wrong before untried before right.
        if (good is True and report.good is not True) or (good is None and report.good is False):
            good, seen = report.good, report.seen
        found[report.kernels] = good, seen
    return found


_lock = threading.Lock()
_known: dict[tuple[Kernels, torch.device], tuple[bool | None, str]] = {}
_said: set[object] = set()


def reason_against(
    kernels: Sequence[Kernels], device: torch.device, tracing: bool
) -> tuple[str | None, bool]:
    """None if ``auto`` may use these kernels, else why not; and whether that is final.

    ``tracing``: torch.compile asks. Then, and inside a CUDA graph capture, nothing is tried.
    """
    mode = setting()
    if mode == "0":
        return None, True
    with _lock:
        missing = [one for one in kernels if (one, device) not in _known]
        if missing and mode != "always":
            missing = _recall(missing, device)
        if missing and (tracing or _is_capturing(device)):
            reason = (
                "they have not been tested on this GPU yet, which cannot be done while "
                f"{'torch.compile traces' if tracing else 'a CUDA graph is captured'}"
            )
            warn_once((missing[0], device, "untested"), missing, reason, "call it once before, or ")
            return reason, False
        if missing:
            _try(missing, device, mode)
        for one in kernels:
            good, seen = _known[one, device]
            if not good:
                reason = seen if good is False else f"they could not be tested ({seen})"
                advice = "to report it: " if good is False else "to test them when it is free: "
                warn_once((one, device), [one], reason, advice)
                return reason, True
    return None, True


def _recall(kernels: Sequence[Kernels], device: torch.device) -> list[Kernels]:
    """Those of which the disk knows nothing; the rest is known from now on."""
    missing = []
    for one in kernels:
        verdict = verdicts.read(verdicts.identity(one.backend, device), one)
        if verdict is None:
            missing.append(one)
        else:
            _known[one, device] = verdict.good, verdict.seen
    return missing


def _try(kernels: Sequence[Kernels], device: torch.device, mode: str) -> None:
    """Find out about kernels, unless another process does so meanwhile."""
    identities = {one: verdicts.identity(one.backend, device) for one in kernels}
    with verdicts.alone(identities[kernels[0]], WAIT):
        missing = list(kernels) if mode == "always" else _recall(kernels, device)
        if not missing:
            return
        _logger.info("testing kernels on this GPU, once: %s", ", ".join(map(str, missing)))
        tasks = [
            (one, known_answers.key(case))
            for one in missing
            for case in known_answers.cases_of(one, thorough=False)
        ]
        for one, (good, seen) in verdicts_of(examine(tasks, device)).items():
            _known[one, device] = good, seen
            if good is not None:
                verdicts.write(identities[one], one, Verdict(good, seen))


def examine(tasks: Sequence[Task], device: torch.device) -> list[Report]:
    """The reports on some tasks."""
    return list(Examination(tasks, device))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def warn_once(
    key: object, kernels: Sequence[Kernels], reason: str, advice: str = "to report it: "
) -> None:
    """Warn that ``auto`` does without some kernels."""
    if key in _said:
        return
    _said.add(key)
    warnings.warn(
        f"rift_kernels: backend='auto' does without the kernels {', '.join(map(str, kernels))} and "
        f"takes the next backend: {reason} ({advice}`{REPORT}`; {ENVIRONMENT_VARIABLE}=0 uses "
        "kernels untested)",
        stacklevel=2,
    )


def forget() -> None:
    """Know nothing, as a process that begins."""
    _known.clear()
    _said.clear()
