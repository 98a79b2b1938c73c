"""Which backend runs a call and in which form; every "no" comes with its reason, as a sentence."""

from __future__ import annotations

import importlib.util
import os
import platform
import warnings
from collections.abc import Sequence

import torch

from ._version import __version__

BACKENDS = ("eager", "triton", "cuda")
ENVIRONMENT_VARIABLE = "RIFT_KERNELS_BACKEND"


def reason_against(
    backend: str, device: torch.device | None = None, dtypes: Sequence[torch.dtype] = ()
) -> str | None:
    """None if ``backend`` can run features of these dtypes there, else why it cannot.

    Without a device: whether it can run anything on this machine.
    """
    if backend == "triton":
        return _reason_against_triton(device, dtypes)
    if backend == "cuda":
        return "this version of rift_kernels contains no CUDA C++ kernels yet"
    return None


def _reason_against_triton(
    device: torch.device | None, dtypes: Sequence[torch.dtype]
) -> str | None:
    if importlib.util.find_spec("triton") is None:
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


def choose_backend(backend: str, device: torch.device, dtypes: Sequence[torch.dtype] = ()) -> str:
    """The backend for features of these dtypes on ``device``.

    An explicit choice, by argument or by ``RIFT_KERNELS_BACKEND``, is kept or refused, never
    replaced.

    Raises:
        ValueError: ``backend`` (or the environment variable) is not a known name.
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
        reason = reason_against(backend, device, dtypes)
        if reason is not None:
            raise RuntimeError(f"{source}={backend!r} cannot run: {reason}")
        return backend
    if not _has_kernels(device):
        return "eager"
    reason = reason_against("triton", device, dtypes)
    if reason is None:
        return "triton"
    _warn_eager_on_gpu(reason)
    return "eager"


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


def backend_report() -> str:
    """What can run here and what cannot, with the reasons: the text of ``python -m rift_kernels``.

    Never raises; imports neither triton nor a CUDA extension.
    """
    found = importlib.util.find_spec("triton")
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        gpu = f"{name} (sm_{capability[0]}{capability[1]})"
    else:
        gpu = "none that torch can use"
    lines = [
        f"rift_kernels {__version__}",
        f"  python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"  torch    {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        f"  triton   {'installed' if found else 'not installed'}",
        f"  GPU      {gpu}",
        f"  {ENVIRONMENT_VARIABLE}={os.environ.get(ENVIRONMENT_VARIABLE, '(not set)')}",
        "backends",
    ]
    for backend in BACKENDS:
        reason = reason_against(backend)
        lines.append(f"  {backend:<8} {'ready' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)
