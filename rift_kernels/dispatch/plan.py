"""The plan of a call, made once: its backend, the form of each layer, and whether it is fused.

:mod:`.availability` says why a backend cannot run; :mod:`rift_kernels.trust` decides which kernels
``auto`` may use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from rift_kernels.trust import decisions, refused_launches
from rift_kernels.trust.decisions import Kind

from . import availability, user_warnings
from .availability import BACKENDS, Problem
from .checks import Layers
from .ranks import Ranks

ENVIRONMENT_VARIABLE = "RIFT_KERNELS_BACKEND"
# CKA in Gram form has separate kernels for up to so many rows.
SMALL_ROWS = 128
# The order in which `auto` tries kernels on a GPU: predicted, not measured. A small loss costs what
# its launches cost the host. Both backends launch twice, and C++ goes through less Python.
PREFERRED = (
    ("cuda", f"linear CKA in Gram form of up to {SMALL_ROWS} rows"),
    ("triton", "every measure, but no float64"),
)
Result = TypeVar("Result")


class Plan(NamedTuple):
    """How a call is computed."""

    backend: str  # "eager", "triton" or "cuda"
    gram: tuple[bool, ...]  # each layer's form: True for Gram (N x N), False for covariance (D x D)
    # The backend computes values and gradients directly from features.
    fused: bool = False
    # The sides whose features the backward reads: "both", those of "needs_grad", or "none", where
    # the forward saves all that the backward needs.
    keeps: str = "none"
    # The kernels that `auto` chose, and replaces if a GPU refuses their launch; else None.
    kind: Kind | None = None

    def kept_sides(self, needs_grad: tuple[bool, bool]) -> tuple[bool, bool]:
        """Whether the features of student and teacher are kept, by whether they need a gradient."""
        if self.keeps == "none":
            return False, False
        return (any(needs_grad), any(needs_grad)) if self.keeps == "both" else needs_grad

    def on_eager(self) -> Plan:
        """The same forms on the eager backend, which computes all that the kernels do."""
        return Plan("eager", self.gram)


def make(
    requested: str, device: torch.device, dtypes: Sequence[torch.dtype], problem: Problem
) -> Plan:
    """The plan of a call.

    Args:
        requested: ``"auto"`` or a backend.
        device, dtypes: of the features, student first.
        problem: what is computed.
    """
    backend = choose_backend(requested, device, dtypes, problem)
    kind = None
    if backend != "eager" and not torch.compiler.is_compiling() and is_automatic(requested):
        kind = kind_of(backend, device, dtypes, problem)
    return with_backend(backend, dtypes, problem, kind)


def with_backend(
    backend: str, dtypes: Sequence[torch.dtype], problem: Problem, kind: Kind | None = None
) -> Plan:
    """The plan of a call whose backend is known."""
    measure, gram = problem.measure, problem.gram
    fused = measure == "cka" or (measure == "covariance" and not any(gram))
    if backend == "eager" or not fused:
        return Plan(backend, gram, kind=kind)
    if backend == "cuda" and all(gram):
        # These kernels compute the gradients with the values.
        return Plan(backend, gram, fused, kind=kind)
    crossed = measure == "cka" and not all(gram)
    # One side alone does not tell the backward that the forward computed in another dtype.
    needs_both = crossed or len(set(dtypes)) > 1
    return Plan(backend, gram, fused, "both" if needs_both else "needs_grad", kind)


def is_automatic(requested: str) -> bool:
    """Whether neither the argument nor the environment names a backend."""
    return requested == "auto" and not os.environ.get(ENVIRONMENT_VARIABLE)


def choose_backend(
    backend: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (),
    problem: Problem | None = None,
) -> str:
    """The backend for this problem on features of these dtypes on ``device``.

    An explicit choice, by argument or by ``RIFT_KERNELS_BACKEND``, is kept or refused, never
    replaced. ``auto`` takes only kernels that passed their test here; see
    :mod:`rift_kernels.trust.self_test`.

    Raises:
        ValueError: ``backend`` (or the environment variable) names no backend.
        RuntimeError: the backend named cannot run; the message says why.
    """
    source = "backend"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = ENVIRONMENT_VARIABLE
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(
                f"{source} must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}; "
                f"got {backend!r}"
            )
        reason = availability.reason_against(backend, device, dtypes, problem)
        if reason is not None:
            raise RuntimeError(f"{source}={backend!r} cannot run: {reason}")
        return backend
    if not _has_kernels(device):
        return "eager"
    reasons, distrusted = [], False
    for preferred, _ in PREFERRED:
        # The CUDA kernels for many rows are not measured: only an explicit choice takes them.
        if preferred == "cuda" and not (problem and all(problem.gram)):
            continue
        reason = availability.reason_against(preferred, device, dtypes, problem)
        if reason is not None:
            reasons.append(f"{preferred}: {reason}")
        elif _is_trusted(kind_of(preferred, device, dtypes, problem)):
            return preferred
        else:
            distrusted = True  # of which the test has warned
    if reasons and not distrusted:
        _warn_eager_on_gpu("; ".join(reasons))
    return "eager"


def kind_of(
    backend: str, device: torch.device, dtypes: Sequence[torch.dtype], problem: Problem | None
) -> Kind:
    """The kind of a call; calls of a kind run the same kernels, or nearly."""
    if problem is not None:
        gram = problem.gram
        if problem.measure == "cka":
            gram_family = ""
            if any(gram):
                is_small = problem.rows <= SMALL_ROWS
                gram_family = "gram_cka_small" if is_small else "gram_cka"
            return Kind(backend, "cka", gram, gram_family, tuple(dtypes), device)
        if problem.measure == "covariance" and not any(gram):
            return Kind(backend, "covariance_distance", (), "", tuple(dtypes), device)
    return Kind(backend, "products", (), "", tuple(dtypes), device)


def _is_trusted(kind: Kind) -> bool:
    if torch.compiler.is_compiling():
        # Imported late: it imports Dynamo.
        from rift_kernels.trust import traced

        # Its arguments must be constants, and with dynamic sizes a form is one only after a branch.
        backend, measure, gram, *rest = kind
        return traced.is_trusted(backend, measure, tuple(1 if form else 0 for form in gram), *rest)
    return decisions.is_trusted(kind)


def run(
    compute: Callable[[Plan], Result],
    requested: str,
    problem: Problem,
    layers: Layers,
    ranks: Ranks | None,
) -> Result:
    """``compute`` with the plan for these layers.

    If a GPU refuses a launch, ``auto`` makes another plan and computes again. A single rank cannot
    repeat what all ranks do together, and a compiled graph cannot change its plan.
    """
    device = layers.teachers[0].device
    plan = make(requested, device, layers.dtypes, problem)
    while ranks is None and plan.kind is not None:
        try:
            return compute(plan)
        except Exception as error:
            if not withdraw_if_refused(plan, error):
                raise
            successor = make(requested, device, layers.dtypes, problem)
            if successor.backend == plan.backend:
                raise
            plan = successor
    return compute(plan)


def withdraw_if_refused(plan: Plan, error: Exception) -> bool:
    """Whether a launch was refused that ``auto`` chose; it then stops using the plan's kernels."""
    if plan.kind is None or not refused_launches.is_refusal(error):
        return False
    decisions.withdraw(plan.kind, f"a launch failed: {refused_launches.first_line(error)}")
    return True


def _has_kernels(device: torch.device) -> bool:
    """Whether ``auto`` looks for kernels here: on a CPU it would find Triton's slow interpreter."""
    return device.type == "cuda"


_warned = False


def _warn_eager_on_gpu(reason: str) -> None:
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    _warned = True
    user_warnings.warn(f"rift_kernels runs on the eager backend on this GPU: {reason}")


def use_gram(measure: str, rows: int, student_width: int, teacher_width: int) -> bool:
    """Whether forward and student gradient need fewer FLOPs in the N x N form than in the D x D."""
    n, d1, d2 = rows, student_width, teacher_width
    if measure == "cka":
        # N^2 (3 D1 + D2) < N (D1 + D2) (3 D1 + D2), both with symmetric products at half.
        return n < d1 + d2
    if measure == "covariance":
        # The Gram form works on two N x D matrices, U and V: 8 N^2 D < 4 N D^2.
        return 2 * n < d1
    # Newton-Schulz: 15 steps of three products for a polar factor, 12 of four for transport.
    polar, transport = 15 * 3 * 2, 12 * 4 * 2
    if measure == "procrustes":
        gram = n * n * (3 * d1 + d2) + transport * n**3
        covariance = 4 * n * d1 * d2 + polar * min(d1, d2) ** 2 * max(d1, d2)
    elif measure == "bures":  # d1 == d2
        gram = 4 * n * n * d1 + polar * n**3
        covariance = 4 * n * d1 * d1 + transport * d1**3
    else:
        raise ValueError(f"there is no measure {measure!r}")
    return gram < covariance
