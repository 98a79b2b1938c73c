"""Which backend runs a call and in which form; every "no" comes with its reason, as a sentence."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from rift_kernels.trust import decisions, refusals

BACKENDS = ("eager", "triton", "cuda")
ENVIRONMENT_VARIABLE = "RIFT_KERNELS_BACKEND"
# Asked once: torch 2.11 compiles nothing that asks.
INSTALLED = {
    name: importlib.util.find_spec(name) is not None for name in ("triton", "rift_kernels._C")
}
# In Gram form other kernels take more.
SMALL_ROWS = 128
Result = TypeVar("Result")


class Problem(NamedTuple):
    """What is asked of a backend: a measure of layers in these forms, of at most these sizes."""

    measure: str
    gram: tuple[bool, ...]
    rows: int
    width: int
    masked: bool = False


# What `auto` takes on a GPU, predicted, not measured: a small loss costs what its launches cost the
# host. Both kinds make two, forward and backward, and one from C++ goes through less Python.
PREFERRED = (
    ("cuda", "linear CKA in Gram form of up to 128 rows"),
    ("triton", "every measure, but no float64"),
)


def reason_against(
    backend: str,
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] = (),
    problem: Problem | None = None,
) -> str | None:
    """None if ``backend`` can run this problem on features of these dtypes there, else why not.

    Without a device: whether it can run anything on this machine.
    """
    if backend == "triton":
        return _reason_against_triton(device, dtypes)
    if backend == "cuda":
        return _reason_against_cuda(device, dtypes, problem)
    return None


def _reason_against_cuda(
    device: torch.device | None, dtypes: Sequence[torch.dtype], problem: Problem | None
) -> str | None:
    if not INSTALLED["rift_kernels._C"]:
        return (
            "rift_kernels was installed without its CUDA kernels: put the toolkit's nvcc on PATH "
            "and install it again with RIFT_KERNELS_CUDA=1"
        )
    if torch.version.hip is not None:
        return "the CUDA kernels are for NVIDIA's GPUs"
    if device is None and not torch.cuda.is_available():
        return "the CUDA kernels need a GPU that torch can use, and there is none"
    if device is not None and device.type != "cuda":
        return f"the CUDA kernels take features on a GPU; got {device.type}"
    if torch.float64 in dtypes:
        return "the CUDA kernels take no float64, which the eager backend does"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 8:
        return "the CUDA kernels need compute capability 8.0; got {}.{}".format(*capability)
    return None if device is None else _too_much_for_cuda(device, dtypes, problem)


def _too_much_for_cuda(
    device: torch.device, dtypes: Sequence[torch.dtype], problem: Problem | None
) -> str | None:
    from rift_kernels.backends import cuda

    if problem is None or problem.measure != "cka":
        got = "any measure" if problem is None else problem.measure
        return f"the CUDA kernels compute linear CKA; got {got}"
    capability = torch.cuda.get_device_capability(device)
    if not cuda.compiled_for(capability):
        return (
            "the CUDA kernels were not compiled for compute capability {}.{}: install again with "
            "RIFT_KERNELS_CUDA_ARCHS".format(*capability)
        )
    if not all(problem.gram):
        return _too_much_in_covariance_form(dtypes, problem, cuda.most_columns(device))
    if problem.rows > cuda.MAX_ROWS:
        return f"the CUDA kernels take up to {cuda.MAX_ROWS} rows; got {problem.rows}"
    if not cuda.fits(device, problem.rows, problem.width):
        return f"{problem.rows} rows of {problem.width} columns do not fit the GPU's shared memory"
    return None


def _too_much_in_covariance_form(
    dtypes: Sequence[torch.dtype], problem: Problem, most_columns: int
) -> str | None:
    """Of more rows than student and teacher have columns together."""
    if any(problem.gram):
        return (
            "the CUDA kernels take layers with few rows or layers with many, not both in one call"
        )
    if set(dtypes) != {torch.bfloat16}:
        return f"the CUDA kernels for many rows take bfloat16; got {' and '.join(map(str, dtypes))}"
    if problem.masked:
        return "the CUDA kernels for many rows take no mask"
    if problem.width > most_columns:
        return (
            f"the CUDA kernels for many rows take up to {most_columns} columns on this GPU; got "
            f"{problem.width}"
        )
    return None


def _reason_against_triton(
    device: torch.device | None, dtypes: Sequence[torch.dtype]
) -> str | None:
    if not INSTALLED["triton"]:
        return "triton is not installed"
    if torch.float64 in dtypes:
        return "the Triton kernels take no float64, which the eager backend does"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
        return None
    if device is None and not torch.cuda.is_available():
        return (
            "Triton needs a GPU that torch can use, and there is none (on a CPU, its interpreter "
            "runs the kernels where TRITON_INTERPRET=1 is set from the start)"
        )
    if device is not None and device.type != "cuda":
        return f"the Triton kernels take features on a GPU; got {device.type}"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the Triton kernels need compute capability 8.0; got {major}.{minor}"
    return None


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
        reason = reason_against(backend, device, dtypes, problem)
        if reason is not None:
            raise RuntimeError(f"{source}={backend!r} cannot run: {reason}")
        return backend
    if not _has_kernels(device):
        return "eager"
    for preferred, _ in PREFERRED:
        # Many rows in CUDA only if asked for, as long as that has not been measured.
        if preferred == "cuda" and not (problem and all(problem.gram)):
            continue
        reason = reason_against(preferred, device, dtypes, problem)
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
    function: Callable[[str], Result],
    backend: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    problem: Problem,
    repeatable: bool = True,
) -> Result:
    """``function`` of the backend chosen; where a GPU refuses a launch of it, ``auto`` goes on.

    ``repeatable``: it may be called once more. Inside a compiled graph nothing can be replaced.
    """
    chosen = choose_backend(backend, device, dtypes, problem)
    while repeatable and chosen != "eager" and not torch.compiler.is_compiling():
        try:
            return function(chosen)
        except Exception as error:
            if not gives_way(error, backend, kind_of(chosen, device, dtypes, problem)):
                raise
            following = choose_backend(backend, device, dtypes, problem)
            if following == chosen:
                raise
            chosen = following
    return function(chosen)


def gives_way(error: Exception, backend: str, kind: decisions.Kind) -> bool:
    """Whether ``auto`` does without these kernels from now on, because of how a launch failed."""
    automatic = backend == "auto" and not os.environ.get(ENVIRONMENT_VARIABLE)
    if not automatic or not refusals.is_refusal(error):
        return False
    decisions.withdraw(kind, f"a launch failed: {refusals.first_line(error)}")
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
