"""``python -m rift_kernels.commands.trial``: the process in which trust/self_test tries kernels.

Its arguments are a device and pairs of kernels and a case, as JSON. On lines of its own it says
what it begins and what came of it; whatever else is printed, or happens, is for its parent to see.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rift_kernels.dispatch import autograd
from rift_kernels.dispatch.availability import Problem
from rift_kernels.dispatch.plan import with_backend
from rift_kernels.trust import verdicts
from rift_kernels.trust.known_answers import CASES, DTYPES, Case, answers, features, key, sketch
from rift_kernels.trust.verdicts import Kernels

# What a line begins with that is meant for the parent.
MARK = "rift_kernels.commands.trial "
# The exit status of a process whose GPU answers no more.
BROKEN = 3
# Absolute up to 1, relative beyond; of gradients relative, and of the half types mostly rounding.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {"bfloat16": 4e-3, "float32": 1e-4, "float16": 4e-3}
# Near its teacher a student's gradient is a small difference, and kernels carry 16 bits of float32.
NEAR_TOLERANCE = 1e-3
REPEATS = 3
# What says nothing about kernels, in errors' messages.
_UNAVAILABLE = ("out of memory", "busy or unavailable", "CUDA_ERROR_OUT_OF_MEMORY")


class Outcome(NamedTuple):
    """What became of a case: right or not, or None where it could not be tried."""

    good: bool | None
    seen: str = ""  # what was wrong
    value_error: float | None = None
    gradient_error: float | None = None


def judge(kernels: Kernels, case: Case, device: torch.device) -> Outcome:
    """Run a case; an exception is the caller's to judge."""
    given = features(case, device)
    dtype = DTYPES[kernels.dtype]
    students = _rounded(case, given.students, dtype, case.sides[0])
    teachers = _rounded(case, given.teachers, torch.float32 if case.mixed else dtype, case.sides[1])
    gram = (case.gram,) * len(students)
    problem = Problem(case.measure, gram, 0, 0)
    plan = with_backend(kernels.backend, (students[0].dtype, teachers[0].dtype), problem)
    call = autograd.Call(case.measure, case.settings, plan, "highest")
    found: list[list[Tensor]] = []
    for _ in range(REPEATS):
        values = autograd.measure(call, students, teachers, given.masks)
        inputs = [t for t in (*students, *teachers) if t.requires_grad]
        grads = torch.autograd.grad(values, inputs, given.incoming.to(values.dtype))
        found.append([values.detach(), *grads])
    first, *others = found
    for again in others:
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return Outcome(False, f"{case.name}: results differ from one run to the next")
    values, *gradients = first
    masks = given.masks and [m for side in case.sides if side for m in given.masks]
    return _compared(kernels, case, values, gradients, masks)


def _compared(
    kernels: Kernels, case: Case, values: Tensor, gradients: Sequence[Tensor], masks: list[Tensor]
) -> Outcome:
    expected = answers()[key(case)]
    wanted = torch.tensor(expected["values"], dtype=torch.float64)
    error = (values.double().cpu().reshape(-1) - wanted).abs() / wanted.abs().clamp(min=1)
    value_error, gradient_error = float(error.max()), 0.0
    for gradient, stored in zip(gradients, expected["gradients"], strict=True):
        exact = torch.tensor(stored, dtype=torch.float64)
        off = (sketch(gradient) - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
        # NaN stays, which `max` of Python may lose.
        gradient_error = float(torch.stack([off.max(), torch.tensor(gradient_error)]).max())
    tolerance = GRADIENT_TOLERANCE[kernels.dtype]
    if case.near:
        tolerance = max(tolerance, NEAR_TOLERANCE)
    wrong = []
    if not value_error <= VALUE_TOLERANCE:
        wrong.append(f"value off by {value_error:.1e} (allowed {VALUE_TOLERANCE:.0e})")
    if not gradient_error <= tolerance:
        wrong.append(f"gradient off by {gradient_error:.1e} (allowed {tolerance:.0e})")
    for mask, gradient in zip(masks, gradients, strict=bool(masks)):
        if bool(gradient[~mask].count_nonzero()):
            wrong.append("a masked row has a gradient")
    seen = f"{case.name}: {', '.join(wrong)}" if wrong else ""
    return Outcome(not wrong, seen, _finite(value_error), _finite(gradient_error))


def _finite(error: float) -> float | None:
    """JSON has no NaN."""
    return error if error < float("inf") else None


def _rounded(case: Case, sides: list[Tensor], dtype: torch.dtype, wanted: bool) -> list[Tensor]:
    """Leaves in the dtype under test."""
    found = []
    for side in sides:
        side = side.to(dtype)
        if case.strided:
            room = torch.full((*side.shape[:-1], 2 * side.shape[-1] + 1), float("nan"))
            side = room.to(side)[..., 1::2].copy_(side)
        found.append(side.requires_grad_(wanted))
    return found


def attempt(kernels: Kernels, case: Case, device: torch.device) -> Outcome:
    """:func:`judge`, whatever it raises."""
    try:
        return judge(kernels, case, device)
    except Exception as error:
        text = f"{case.name}: {type(error).__name__}: {error}".strip().splitlines()[0][:300]
        unavailable = isinstance(error, torch.OutOfMemoryError)
        unavailable = unavailable or any(words in str(error) for words in _UNAVAILABLE)
        return Outcome(None if unavailable else False, text)


def _say(**event: Any) -> None:
    print(f"\n{MARK}{json.dumps(event)}", flush=True)


def _answers_no_more(device: torch.device) -> bool:
    """Whether an error has left the GPU's context unusable, as those in kernels do."""
    try:
        torch.zeros(1, device=device).cpu()
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str]) -> int:
    """Go through the pairs, until the GPU answers no more."""
    device, pairs = torch.device(arguments[0]), json.loads(arguments[1])
    named = {key(case): case for case in CASES}
    # Nothing of the kernels: what fails here is no verdict on them.
    torch.zeros(1, device=device).cpu()
    backends = dict.fromkeys(Kernels(*kernels).backend for kernels, _ in pairs)
    _say(event="started", identities={b: verdicts.identity(b, device) for b in backends})
    for kernels, name in pairs:
        case = named[name]
        _say(event="case", kernels=kernels, case=name)
        start = time.perf_counter()
        outcome = attempt(Kernels(*kernels), case, device)
        seconds = round(time.perf_counter() - start, 3)
        _say(event="outcome", kernels=kernels, case=name, seconds=seconds, **outcome._asdict())
        if outcome.good is not True and _answers_no_more(device):
            return BROKEN
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # Not by way of destructors, which a broken context may stop.
    os._exit(code)
