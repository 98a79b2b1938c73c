"""Mends Triton's interpreter, which runs the kernels on a CPU (TRITON_INTERPRET=1).

It holds bfloat16 as its bits in uint16, multiplies those bits in ``tl.dot``, and cuts
off where the hardware rounds. ``tests/test_triton_interpreter.py`` fails once this is not needed.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs
from triton.language import core
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_original_cast = interpreter.InterpreterBuilder.cast_impl


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _rounded(data: Any) -> Any:
    """The bits of float32 numbers as bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    # In 64 bits, because a NaN's may overflow.
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _cast(self: Any, source: Any, target: Any) -> Any:
    before, after = source.dtype.scalar, target.scalar
    if before == tl.bfloat16 and after == tl.float32:
        return _Handle(_widened(source), after)
    if before == tl.float32 and after == tl.bfloat16:
        return _Handle(_rounded(source.data), after)
    return _original_cast(self, source, target)


def _dot(_: Any, a: Any, b: Any, acc: Any, *__: Any) -> Any:
    dtype = acc.data.dtype
    product = np.matmul(_widened(a).astype(dtype), _widened(b).astype(dtype))
    return _Handle(product + acc.data, acc.dtype.scalar)


def is_active() -> bool:
    """Whether kernels run in the interpreter; triton reads that when a kernel is defined."""
    return bool(knobs.runtime.interpret)


_members: dict[Any, list[tuple[str, Any]]] = {}


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """What the original does, unless it is done: calls of device functions ask for it again.

    Looking through the language at each of them took half of the interpreter's time.
    """
    if package not in _members:
        found = inspect.getmembers(package)
        _members[package] = [(name, member) for name, member in found if core.is_builtin(member)]
    for name, member in _members[package]:
        if getattr(package, name) is not member:
            # All are patched, or none.
            return
        interpreter._patch_attr(package, name, member, builder, scope)


def mend() -> None:
    """For this process, for good."""
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_builtin = _patch_builtin
