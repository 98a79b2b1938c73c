"""Two writers of one element within a launch, which Triton's interpreter would not notice.

It runs programs one after the other, so that the last writer wins. On a GPU either may, and where
their values differ in the last bit, repeats do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class TwoWritersError(AssertionError):
    """Which kernel, and how many of its elements."""


class _Stores:
    """Of one launch: the addresses that are written, and by whom.

    A writer is a program between two of its barriers, which keep its own stores in order; nothing
    orders those of two programs.
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
        """How many elements."""
        if not self.addresses:
            return 0
        sizes = [a.size for a in self.addresses]
        address = np.concatenate(self.addresses)
        program, writer = (np.repeat(who, sizes) for who in (self.programs, self.writers))
        # Writers of one element come in the order of time.
        order = np.argsort(address, kind="stable")
        address, program, writer = address[order], program[order], writer[order]
        apart = (program[1:] != program[:-1]) | (writer[1:] == writer[:-1])
        return int(np.count_nonzero((address[1:] == address[:-1]) & apart))


@contextmanager
def watched() -> Iterator[None]:
    """Inside, a launch in which two write one element raises TwoWritersError."""
    stores = _Stores()
    launch, store = GridExecutor.__call__, InterpreterBuilder.create_masked_store
    barrier, begin = InterpreterBuilder.create_barrier, InterpreterBuilder.set_grid_idx

    def watched_launch(self: Any, *arguments: Any, **options: Any) -> None:
        stores.__init__()
        launch(self, *arguments, **options)
        count = stores.written_twice()
        if count:
            raise TwoWritersError(f"{self.fn.__name__} writes {count} elements twice")

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        stores.add(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel())
        return store(self, pointers, value, mask, *how)

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
