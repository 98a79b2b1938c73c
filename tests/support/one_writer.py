"""Finds two writers of one element within a launch, which Triton's interpreter does not notice.

The interpreter runs programs one after the other, so that the last writer wins. On a GPU either may
win, and repeats differ if the values differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class TwoWritersError(AssertionError):
    """Names the kernel, and how many elements it writes twice."""


class _Stores:
    """The addresses that a launch writes, and their writers.

    A writer is a program between two of its barriers, which keep its own stores in order. Nothing
    orders the stores of two programs.
    """

    def __init__(self) -> None:
        self.program = self.writer = -1
        self.addresses: list[np.ndarray] = []
        self.programs: list[int] = []
        self.writers: list[int] = []

    def add(self, addresses: np.ndarray) -> None:
        if addresses.size:
            self.addresses.append(addresses)
            self.programs.append(self.program)
            self.writers.append(self.writer)

    def written_twice(self) -> int:
        """The number of elements with two writers."""
        if not self.addresses:
            return 0
        sizes = [a.size for a in self.addresses]
        address = np.concatenate(self.addresses)
        program, writer = (np.repeat(ids, sizes) for ids in (self.programs, self.writers))
        # A stable sort keeps the writers of one element in the order of time.
        order = np.argsort(address, kind="stable")
        address, program, writer = address[order], program[order], writer[order]
        is_unordered = (program[1:] != program[:-1]) | (writer[1:] == writer[:-1])
        return int(np.count_nonzero((address[1:] == address[:-1]) & is_unordered))


@contextmanager
def watched() -> Iterator[None]:
    """Inside, a launch with two writers of one element raises TwoWritersError."""
    stores = _Stores()
    launch, store = GridExecutor.__call__, InterpreterBuilder.create_masked_store
    barrier, begin = InterpreterBuilder.create_barrier, InterpreterBuilder.set_grid_idx

    def watched_launch(self: Any, *arguments: Any, **options: Any) -> None:
        stores.__init__()
        launch(self, *arguments, **options)
        count = stores.written_twice()
        if count:
            raise TwoWritersError(f"{self.fn.__name__} writes {count} elements twice")

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        stores.add(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel())
        return store(self, pointers, value, mask, *options)

    def watched_begin(self: Any, *index: int) -> None:
        stores.program += 1
        stores.writer += 1
        begin(self, *index)

    def watched_barrier(self: Any) -> Any:
        stores.writer += 1
        return barrier(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", watched_launch)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        patch.setattr(InterpreterBuilder, "create_barrier", watched_barrier)
        patch.setattr(InterpreterBuilder, "set_grid_idx", watched_begin)
        yield
