"""Repairs Triton's interpreter, which runs the kernels on a CPU (TRITON_INTERPRET=1).

The interpreter holds bfloat16 as bits in uint16, multiplies those bits in ``tl.dot``, and truncates
where hardware rounds. ``tests/backends/test_triton.py`` fails once it needs no repair.

Products are added as tensor cores add them (Fasi et al., PeerJ CS 7:e330; Khattak & Mikaitis,
arXiv 2512.07004). The running sum and a block's exact products are truncated at the same bit, two
below the last bit of the largest. Their sum is truncated to float32. Long sums thus lose a little
with every block, which rounding to nearest would hide.
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
    # In 64 bits, because a NaN's bits may overflow.
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _cast(self: Any, source: Any, target: Any) -> Any:
    before, after = source.dtype.scalar, target.scalar
    if before == tl.bfloat16 and after == tl.float32:
        return _Handle(_widened(source), after)
    if before == tl.float32 and after == tl.bfloat16:
        return _Handle(_rounded(source.data), after)
    return _original_cast(self, source, target)


# As on sm_90. Blocks of 8, on sm_80, lose about as much: more often, but from fewer terms.
_PRODUCTS = 16
_EXTRA_BITS = 2


def _dot(_: Any, a: Any, b: Any, acc: Any, *__: Any) -> Any:
    dtype = acc.data.dtype
    left, right = _widened(a).astype(dtype), _widened(b).astype(dtype)
    operands = (left, right, acc.data)
    if dtype == np.float32 and all(np.isfinite(operand).all() for operand in operands):
        result = acc.data.copy()
        # Rows and columns of padding add nothing.
        rows, inner, columns = left.any(1), left.any(0) & right.any(1), right.any(0)
        left, right = left[rows][:, inner], right[inner][:, columns]
        block = np.ix_(rows, columns)
        result[block] = _accumulated(left, right, result[block])
    else:
        result = np.matmul(left, right) + acc.data
    return _Handle(result, acc.dtype.scalar)


def _accumulated(a: Any, b: Any, acc: Any) -> Any:
    """``acc + a b``, one block of products after another."""
    for first in range(0, len(b), _PRODUCTS):
        block = slice(first, first + _PRODUCTS)
        # Exact, because the factors have up to 12 bits.
        products = a.T[block, :, None] * b[block, None, :]
        largest = np.maximum(np.abs(products).max(0), np.abs(acc))
        _, exponent = np.frexp(largest)
        bits = 24 + _EXTRA_BITS - exponent
        scale = np.ldexp(1.0, bits)
        if not np.isfinite(largest).all():
            return acc + a @ b
        total = (products * scale).astype(np.int32).sum(0) + (acc * scale).astype(np.int32)
        acc = _truncated(np.ldexp(total.astype(np.float64), -bits))
    return acc


def _truncated(data: Any) -> Any:
    """float64 numbers as float32, toward zero."""
    rounded = data.astype(np.float32)
    beyond = np.abs(rounded.astype(np.float64)) > np.abs(data)
    return np.where(beyond, np.nextafter(rounded, np.float32(0)), rounded)


def is_active() -> bool:
    """Whether kernels run in the interpreter, which triton decides when a kernel is defined."""
    return bool(knobs.runtime.interpret)


_members: dict[Any, list[tuple[str, Any]]] = {}


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Do what the original does, but once, though every call of a device function asks for it.

    Searching the language each time took half of the interpreter's time.
    """
    if package not in _members:
        members = inspect.getmembers(package)
        _members[package] = [(name, member) for name, member in members if core.is_builtin(member)]
    for name, member in _members[package]:
        if getattr(package, name) is not member:
            # Either all members are patched or none.
            return
        interpreter._patch_attr(package, name, member, builder, scope)


def repair() -> None:
    """Repair the interpreter, for the life of this process."""
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_builtin = _patch_builtin
