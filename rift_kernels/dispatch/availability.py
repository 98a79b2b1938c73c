"""Which backend can run a call, and why another cannot, as a sentence."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

BACKENDS = ("eager", "triton", "cuda")
# Asked once: torch 2.11 compiles nothing that asks.
INSTALLED = {
    name: importlib.util.find_spec(name) is not None for name in ("triton", "rift_kernels._C")
}


class Problem(NamedTuple):
    """What is asked of a backend: a measure of layers in these forms, of at most these sizes."""

    measure: str
    gram: tuple[bool, ...]
    rows: int
    width: int
    masked: bool = False


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
