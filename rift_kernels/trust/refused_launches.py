"""Launches that a GPU refuses, for lack of resources or of code for its architecture.

A refused launch has no effect, so another kernel can run instead. An error inside a kernel is
different: the GPU may be unusable after it.
"""

from __future__ import annotations

# Triton's errors, by name because triton may not be installed.
_TRITON = {"OutOfResources", "PTXASError", "CompilationError"}
# Parts of messages of CUDA's runtime and driver, as csrc, Triton and torch pass them on.
_MESSAGES = (
    "cudaErrorInvalidConfiguration",
    "invalid configuration argument",
    "cudaErrorLaunchOutOfResources",
    "too many resources requested for launch",
    "out of resource",
    "cudaErrorCooperativeLaunchTooLarge",
    "too many blocks in cooperative launch",
    "cudaErrorInvalidClusterSize",
    "cluster misconfiguration",
    "cudaErrorNoKernelImageForDevice",
    "no kernel image is available",
    "cudaErrorInvalidDeviceFunction",
    "invalid device function",
    "cudaErrorInvalidKernelImage",
    "device kernel image is invalid",
    "cudaErrorUnsupportedPtxVersion",
    "unsupported toolchain",
    "cudaErrorInvalidPtx",
    "a PTX JIT compilation failed",
    # Too much shared memory, or more parameters than the driver takes.
    "cudaErrorInvalidValue",
    "Triton Error [CUDA]: invalid argument",
    "PassManager::run failed",
)


def is_refusal(error: BaseException) -> bool:
    """Whether a launch was refused before anything ran."""
    for cls in type(error).__mro__:
        if cls.__name__ in _TRITON and cls.__module__.partition(".")[0] == "triton":
            return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".removesuffix(": ")


def add_advice(error: BaseException) -> None:
    """Add to a refused launch's error how to avoid it."""
    note = (
        "rift_kernels: this GPU refuses to launch a kernel. backend='eager', or "
        "RIFT_KERNELS_BACKEND=eager for the whole process, does without it."
    )
    if is_refusal(error) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
