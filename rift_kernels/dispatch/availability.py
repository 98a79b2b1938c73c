"""Whether a backend can run a call, and the reason, as a sentence, if it cannot."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

BACKENDS = ("eager", "triton", "cuda")
# Looked up at import, because torch 2.11 cannot trace find_spec.
INSTALLED = {
    name: importlib.util.find_spec(name) is not None for name in ("triton", "rift_kernels._C")
}


class Problem(NamedTuple):
    """What a backend has to compute."""

    measure: str  # or "moments": second moments alone
    gram: tuple[bool, ...]  # each layer's form: True for Gram, False for covariance
    rows: int  # the most of any layer
    width: int  # the largest of any layer
    masked: bool = False


def reason_against(
    backend: str,
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] = (),
    problem: Problem | None = None,
) -> str | None:
    """Why ``backend`` cannot run this problem on features of these dtypes; None if it can.

    Without a device: why it can run nothing on this machine.
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
        return "the CUDA kernels run on NVIDIA GPUs only"
    if device is None and not torch.cuda.is_available():
        return "the CUDA kernels need a GPU that torch can use, and there is none"
    if device is not None and device.type != "cuda":
        return f"the CUDA kernels take features on a GPU; got {device.type}"
    if torch.float64 in dtypes:
        return "the CUDA kernels do not take float64; the eager backend does"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 8:
        return "the CUDA kernels need compute capability 8.0; got {}.{}".format(*capability)
    return None if device is None else _reason_against_problem(device, dtypes, problem)


def _reason_against_problem(
    device: torch.device, dtypes: Sequence[torch.dtype], problem: Problem | None
) -> str | None:
    """Why the CUDA kernels that were built cannot compute this."""
    from rift_kernels.backends import cuda

    if problem is None or problem.measure != "cka":
        measure = "any measure" if problem is None else problem.measure
        return f"the CUDA kernels compute linear CKA; got {measure}"
    capability = torch.cuda.get_device_capability(device)
    if not cuda.compiled_for(capability):
        return (
            "the CUDA kernels were not compiled for compute capability {}.{}: install again with "
            "RIFT_KERNELS_CUDA_ARCHS".format(*capability)
        )
    if not all(problem.gram):
        return _reason_against_many_rows(dtypes, problem, cuda.MAX_COLUMNS)
    if problem.rows > cuda.MAX_ROWS:
        return f"the CUDA kernels take up to {cuda.MAX_ROWS} rows; got {problem.rows}"
    if not cuda.fits(device, problem.rows, problem.width):
        return f"{problem.rows} rows of {problem.width} columns do not fit the GPU's shared memory"
    return None


def _reason_against_many_rows(
    dtypes: Sequence[torch.dtype], problem: Problem, max_columns: int
) -> str | None:
    """Why the CUDA kernels for covariance form cannot compute this."""
    if any(problem.gram):
        return (
            "the CUDA kernels take layers with few rows or layers with many, not both in one call"
        )
    if set(dtypes) != {torch.bfloat16}:
        return f"the CUDA kernels for many rows take bfloat16; got {' and '.join(map(str, dtypes))}"
    if problem.masked:
        return "the CUDA kernels for many rows take no mask"
    if problem.width > max_columns:
        return (
            f"the CUDA kernels for many rows take up to {max_columns} columns; got {problem.width}"
        )
    return None


def _reason_against_triton(
    device: torch.device | None, dtypes: Sequence[torch.dtype]
) -> str | None:
    if not INSTALLED["triton"]:
        return "triton is not installed"
    if torch.float64 in dtypes:
        return "the Triton kernels do not take float64; the eager backend does"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
        return None
    if device is None and not torch.cuda.is_available():
        return (
            "Triton needs a GPU that torch can use, and there is none (on a CPU, its interpreter "
            "runs the kernels if TRITON_INTERPRET=1 is set when Python starts)"
        )
    if device is not None and device.type != "cuda":
        return f"the Triton kernels take features on a GPU; got {device.type}"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the Triton kernels need compute capability 8.0; got {major}.{minor}"
    return None
