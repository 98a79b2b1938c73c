"""``python -m rift_kernels.commands.trial``: the separate process in which kernels are tested.

trust/examination.py starts it. Its arguments are a device and, as JSON, pairs of kernels and a
case. It prints a marked line before each case and another with the outcome. The parent also sees
all other output, and how the process ends.
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
from rift_kernels.trust import self_test, verdicts
from rift_kernels.trust.examination import MARK
from rift_kernels.trust.known_answers import CASES, DTYPES, Case, answers, features, key, sketch
from rift_kernels.trust.verdicts import Kernels

# The exit status of a process whose GPU has stopped responding.
BROKEN = 3
# For values, absolute up to 1 and relative beyond; for gradients, relative. In half precision most
# of it is rounding.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {"bfloat16": 4e-3, "float32": 1e-4, "float16": 4e-3}
# Near the teacher a gradient is a small difference, and kernels keep only 16 bits of a float32.
NEAR_TOLERANCE = 1e-3
REPEATS = 3
# Parts of error messages that say nothing about kernels.
_UNAVAILABLE = ("out of memory", "busy or unavailable", "CUDA_ERROR_OUT_OF_MEMORY")


class Outcome(NamedTuple):
    """The outcome of a case: right or wrong, or None if it could not be tried."""

    good: bool | None
    seen: str = ""  # what was wrong
    value_error: float | None = None
    gradient_error: float | None = None


def judge(kernels: Kernels, case: Case, device: torch.device) -> Outcome:
    """Run a case and compare; an exception is left to the caller."""
    inputs = features(case, device)
    dtype = DTYPES[kernels.dtype]
    teacher_dtype = torch.float32 if case.mixed else dtype
    students = _rounded(case, inputs.students, dtype, case.sides[0])
    teachers = _rounded(case, inputs.teachers, teacher_dtype, case.sides[1])
    gram = (case.gram,) * len(students)
    problem = Problem(case.measure, gram, 0, 0)
    plan = with_backend(kernels.backend, (students[0].dtype, teachers[0].dtype), problem)
    call = autograd.Call(case.measure, case.settings, plan, "highest")
    leaves = [t for t in (*students, *teachers) if t.requires_grad]
    runs: list[list[Tensor]] = []
    for _ in range(REPEATS):
        values = autograd.measure(call, students, teachers, inputs.masks)
        grads = torch.autograd.grad(values, leaves, inputs.incoming.to(values.dtype))
        runs.append([values.detach(), *grads])
    first, *repeats = runs
    for repeat in repeats:
        if not all(torch.equal(a, b) for a, b in zip(first, repeat, strict=True)):
            return Outcome(False, f"{case.name}: results differ from one run to the next")
    values, *gradients = first
    masks = inputs.masks and [m for side in case.sides if side for m in inputs.masks]
    return _compared(kernels, case, values, gradients, masks)


def _compared(
    kernels: Kernels, case: Case, values: Tensor, gradients: Sequence[Tensor], masks: list[Tensor]
) -> Outcome:
    answer = answers()[key(case)]
    exact_values = torch.tensor(answer["values"], dtype=torch.float64)
    error = (values.double().cpu().reshape(-1) - exact_values).abs()
    value_error = float((error / exact_values.abs().clamp(min=1)).max())
    gradient_error = 0.0
    for gradient, stored in zip(gradients, answer["gradients"], strict=True):
        exact = torch.tensor(stored, dtype=torch.float64)
        errors = (sketch(gradient) - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
        # torch's maximum, because Python's may lose a NaN.
        gradient_error = float(torch.stack([errors.max(), torch.tensor(gradient_error)]).max())
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
    """The error; None if it is NaN or infinite, which JSON does not have."""
    return error if error < float("inf") else None


def _rounded(case: Case, sides: list[Tensor], dtype: torch.dtype, wanted: bool) -> list[Tensor]:
    """Leaves in the dtype under test."""
    leaves = []
    for side in sides:
        side = side.to(dtype)
        if case.strided:
            padded = torch.full((*side.shape[:-1], 2 * side.shape[-1] + 1), float("nan"))
            side = padded.to(side)[..., 1::2].copy_(side)
        leaves.append(side.requires_grad_(wanted))
    return leaves


def attempt(kernels: Kernels, case: Case, device: torch.device) -> Outcome:
    """The outcome of :func:`judge`, even if it raises."""
    try:
        return judge(kernels, case, device)
    except Exception as error:
        text = f"{case.name}: {type(error).__name__}: {error}".strip().splitlines()[0][:300]
        is_unavailable = isinstance(error, torch.OutOfMemoryError)
        is_unavailable = is_unavailable or any(part in str(error) for part in _UNAVAILABLE)
        return Outcome(None if is_unavailable else False, text)


def _send(**event: Any) -> None:
    print(f"\n{MARK}{json.dumps(event)}", flush=True)


def _is_broken(device: torch.device) -> bool:
    """Whether the GPU's context is unusable, as after an error inside a kernel."""
    try:
        torch.zeros(1, device=device).cpu()
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str]) -> int:
    """Try all pairs, or those until the GPU stops responding."""
    # Here kernels run before any test has passed.
    os.environ[self_test.ENVIRONMENT_VARIABLE] = "0"
    device, pairs = torch.device(arguments[0]), json.loads(arguments[1])
    cases = {key(case): case for case in CASES}
    # Before any kernel: a failure here is no verdict on them.
    torch.zeros(1, device=device).cpu()
    backends = dict.fromkeys(Kernels(*kernels).backend for kernels, _ in pairs)
    _send(event="started", identities={b: verdicts.identity(b, device) for b in backends})
    for kernels, name in pairs:
        case = cases[name]
        _send(event="case", kernels=kernels, case=name)
        start = time.perf_counter()
        outcome = attempt(Kernels(*kernels), case, device)
        seconds = round(time.perf_counter() - start, 3)
        _send(event="outcome", kernels=kernels, case=name, seconds=seconds, **outcome._asdict())
        if outcome.good is not True and _is_broken(device):
            return BROKEN
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # Without destructors, which a broken context may block.
    os._exit(code)
