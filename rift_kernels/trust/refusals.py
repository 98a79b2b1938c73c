"""Launches that a GPU refuses: for want of resources, or of code for its architecture.

They leave nothing behind, so that something else can be launched instead. What fails within a
kernel is another matter.
"""

from __future__ import annotations

# Triton's own errors, by name: triton may not be there.
_TRITON = {"OutOfResources", "PTXASError", "CompilationError"}
# In messages of CUDA's runtime and driver, by which csrc, Triton and torch report what they say.
_WORDS = (
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
    # More shared memory than there is, or more parameters than the driver takes.
    "cudaErrorInvalidValue",
    "Triton Error [CUDA]: invalid argument",
    "PassManager::run failed",
)


def is_refusal(error: BaseException) -> bool:
    """Whether a launch was refused before anything ran."""
    for cls in type(error).__mro__:
        if cls.__name__ in _TRITON and cls.__module__.partition(".")[0] == "triton":
            return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def first_line(error: BaseException) -> str:
    """An error in a line."""
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
