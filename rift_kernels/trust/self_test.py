"""The self-test: ``auto`` uses only kernels that passed it on this GPU, with this software.

Before their first use, a separate process runs kernels on known answers (examination.py). The
verdict is kept on disk. Kernels cannot be tested if the GPU has no memory left or allows no second
process; they are not used then, and the next process tests them again.
``python -m rift_kernels check`` reports more, at any time.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Sequence

import torch

from . import known_answers, verdicts
from .examination import Examination, Report, Task, verdicts_of
from .verdicts import Kernels, Verdict

ENVIRONMENT_VARIABLE = "RIFT_KERNELS_SELF_TEST"
SETTINGS = {
    "0": "use kernels without a test",
    "1": "test kernels once (the default)",
    "always": "test kernels once per process",
}
# Seconds to wait for other processes that test the same kernels.
WAIT = 900.0
REPORT = "python -m rift_kernels check"

_logger = logging.getLogger("rift_kernels")


def setting() -> str:
    """The value of RIFT_KERNELS_SELF_TEST.

    Raises:
        ValueError: it is not one of :data:`SETTINGS`.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if value not in SETTINGS:
        meanings = ", ".join(f"{name!r} ({meaning})" for name, meaning in SETTINGS.items())
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {meanings}; got {value!r}")
    return value


_lock = threading.Lock()
_known: dict[tuple[Kernels, torch.device], tuple[bool | None, str]] = {}
_warned: set[object] = set()


def reason_against(
    kernels: Sequence[Kernels], device: torch.device, tracing: bool
) -> tuple[str | None, bool]:
    """Why ``auto`` may not use these kernels, or None; and whether the answer is final.

    ``tracing``: torch.compile asks. Then, and during a CUDA graph capture, nothing is tested.
    """
    mode = setting()
    if mode == "0":
        return None, True
    with _lock:
        missing = [group for group in kernels if (group, device) not in _known]
        if missing and mode != "always":
            missing = _recall(missing, device)
        if missing and (tracing or _is_capturing(device)):
            reason = (
                "they have not been tested on this GPU yet, and cannot be while "
                f"{'torch.compile traces' if tracing else 'a CUDA graph is captured'}"
            )
            advice = f"call it once before, or run `{REPORT}`"
            warn_once((missing[0], device, "untested"), missing, reason, advice)
            return reason, False
        if missing:
            _test(missing, device, mode)
        for group in kernels:
            good, seen = _known[group, device]
            if not good:
                reason = seen if good is False else f"they could not be tested ({seen})"
                advice = "shows more" if good is False else "tests them when the GPU is free"
                warn_once((group, device), [group], reason, f"`{REPORT}` {advice}")
                return reason, True
    return None, True


def _recall(kernels: Sequence[Kernels], device: torch.device) -> list[Kernels]:
    """The kernels without a verdict on disk; the verdicts on the others are remembered."""
    missing = []
    for group in kernels:
        verdict = verdicts.read(verdicts.identity(group.backend, device), group)
        if verdict is None:
            missing.append(group)
        else:
            _known[group, device] = verdict.good, verdict.seen
    return missing


def _test(kernels: Sequence[Kernels], device: torch.device, mode: str) -> None:
    """Test kernels and store the verdicts, unless another process does so meanwhile."""
    machines = {group: verdicts.identity(group.backend, device) for group in kernels}
    with verdicts.locked(machines[kernels[0]], WAIT):
        missing = list(kernels) if mode == "always" else _recall(kernels, device)
        if not missing:
            return
        _logger.info("testing kernels on this GPU, once: %s", ", ".join(map(str, missing)))
        tasks = [
            (group, known_answers.key(case))
            for group in missing
            for case in known_answers.cases_of(group, thorough=False)
        ]
        for group, (good, seen) in verdicts_of(examine(tasks, device)).items():
            _known[group, device] = good, seen
            if good is not None:
                verdicts.write(machines[group], group, Verdict(good, seen))


def examine(tasks: Sequence[Task], device: torch.device) -> list[Report]:
    """The reports on these tasks."""
    return list(Examination(tasks, device))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def warn_once(
    key: object, kernels: Sequence[Kernels], reason: str, advice: str = f"`{REPORT}` shows more"
) -> None:
    """Warn, once for each key, that ``auto`` does not use some kernels."""
    if key in _warned:
        return
    _warned.add(key)
    warnings.warn(
        f"rift_kernels: backend='auto' does without the kernels {', '.join(map(str, kernels))} and "
        f"uses the next backend, because {reason}. {advice}; {ENVIRONMENT_VARIABLE}=0 uses kernels "
        "untested",
        stacklevel=2,
    )


def forget() -> None:
    """Forget every result and warning, as if this process had just begun."""
    _known.clear()
    _warned.clear()
