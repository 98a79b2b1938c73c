"""The plan of a call, made once: which backend computes it, in which form, fused or not.

The reasons against a backend are in :mod:`.availability`, and whether ``auto`` trusts its kernels
is decided in :mod:`rift_kernels.trust`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from rift_kernels.trust import decisions, refusals

from . import availability
from .availability import BACKENDS, Problem

ENVIRONMENT_VARIABLE = "RIFT_KERNELS_BACKEND"
# In Gram form other kernels take more.
SMALL_ROWS = 128
# What `auto` takes on a GPU, predicted, not measured: a small loss costs what its launches cost the
# host. Both kinds make two, forward and backward, and one from C++ goes through less Python.
PREFERRED = (
    ("cuda", "linear CKA in Gram form of up to 128 rows"),
    ("triton", "every measure, but no float64"),
)
Result = TypeVar("Result")


class Plan(NamedTuple):
    """How a call is computed."""

    backend: str  # "eager", "triton" or "cuda"
    gram: tuple[bool, ...]  # the form of each layer: Gram (N x N), else covariance (D x D)
    # Whether the backend goes from features to values and gradients without blocks in between.
    fused: bool = False
    # The sides whose features the backward reads: "both", "wanted" (those that get a gradient), or
    # "none", where the forward saves all that the backward needs.
    keeps: str = "none"
    # What `auto` has chosen, and gives up where a GPU refuses a launch; else None.
    kind: decisions.Kind | None = None

    def on_eager(self) -> Plan:
        """The same forms on the eager backend, which can run whatever the kernels can."""
        return Plan("eager", self.gram)


def make(
    problem: Problem, requested: str, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Plan:
    """The plan of a call.

    Args:
        problem: what is computed; with measure ``"moments"`` second moments alone, of one layer
            after another.
        requested: ``"auto"`` or a backend.
        device, dtypes: of the features, student first.
    """
    backend = choose_backend(requested, device, dtypes, problem)
    kind = None
    if backend != "eager" and not torch.compiler.is_compiling() and is_automatic(requested):
        kind = kind_of(backend, device, dtypes, problem)
    return with_backend(problem, backend, dtypes)._replace(kind=kind)


def with_backend(problem: Problem, backend: str, dtypes: Sequence[torch.dtype]) -> Plan:
    """The plan of a call whose backend is known."""
    measure, gram = problem.measure, problem.gram
    fused = measure == "cka" or (measure == "covariance" and not any(gram))
    if backend == "eager" or not fused:
        return Plan(backend, gram)
    if backend == "cuda" and all(gram):
        # The kernel of few rows computes the gradients with the values.
        return Plan(backend, gram, fused)
    crossed = measure == "cka" and not all(gram)
    # One side alone would be taken for what was computed in its dtype.
    both = crossed or len(set(dtypes)) > 1
    return Plan(backend, gram, fused, "both" if both else "wanted")


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
    replaced. ``auto`` takes kernels that were seen to work here; see :mod:`.self_test`.

    Raises:
        ValueError: ``backend`` (or an environment variable) has no known value.
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
    for preferred, _ in PREFERRED:
        # Many rows in CUDA only if asked for, as long as that has not been measured.
        if preferred == "cuda" and not (problem and all(problem.gram)):
            continue
        reason = availability.reason_against(preferred, device, dtypes, problem)
        if reason is None and _is_trusted(kind_of(preferred, device, dtypes, problem)):
            return preferred
    if reason is not None:
        _warn_eager_on_gpu(reason)
    return "eager"


def kind_of(
    backend: str, device: torch.device, dtypes: Sequence[torch.dtype], problem: Problem | None
) -> decisions.Kind:
    """Calls that run the same kernels, or nearly."""
    if problem is not None:
        gram = problem.gram
        if problem.measure == "cka":
            few = "" if not any(gram) else "small" if problem.rows <= SMALL_ROWS else "gram"
            return backend, "cka", gram, few, tuple(dtypes), device
        if problem.measure == "covariance" and not any(gram):
            return backend, "distance", (), "", tuple(dtypes), device
    return backend, "products", (), "", tuple(dtypes), device


def _is_trusted(kind: decisions.Kind) -> bool:
    if torch.compiler.is_compiling():
        # Not before it is needed: it imports Dynamo.
        from rift_kernels.trust import traced

        # A constant is asked for: of sizes that may change, a form is a branch.
        backend, measure, gram, *rest = kind
        return traced.is_trusted(backend, measure, tuple(1 if form else 0 for form in gram), *rest)
    return decisions.is_trusted(kind)


def run(
    function: Callable[[Plan], Result],
    problem: Problem,
    requested: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    repeatable: bool = True,
) -> Result:
    """``function`` of the plan; where a GPU refuses a launch, ``auto`` makes the next plan.

    ``repeatable``: the function may be called again. A compiled graph can replace nothing.
    """
    plan = make(problem, requested, device, dtypes)
    while repeatable and plan.kind is not None:
        try:
            return function(plan)
        except Exception as error:
            if not gives_way(error, plan):
                raise
            successor = make(problem, requested, device, dtypes)
            if successor.backend == plan.backend:
                raise
            plan = successor
    return function(plan)


def gives_way(error: Exception, plan: Plan) -> bool:
    """Whether ``auto`` does without the plan's kernels from now on, because a launch failed."""
    if plan.kind is None or not refusals.is_refusal(error):
        return False
    decisions.withdraw(plan.kind, f"a launch failed: {refusals.first_line(error)}")
    return True


def _has_kernels(device: torch.device) -> bool:
    """Whether ``auto`` looks for kernels there: Triton's interpreter runs only when asked for."""
    return device.type == "cuda"


_warned = False


def _warn_eager_on_gpu(reason: str) -> None:
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"rift_kernels runs on the eager backend on this GPU: {reason}",
        stacklevel=5,
    )


def use_gram(measure: str, rows: int, student_width: int, teacher_width: int) -> bool:
    """True where the N x N form costs fewer FLOPs, forward and student gradient, than the D x D."""
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
    else:  # bures, d1 == d2
        gram = 4 * n * n * d1 + polar * n**3
        covariance = 4 * n * d1 * d1 + transport * d1**3
    return gram < covariance
