"""Full-precision matrix products during one operator, whatever precision the process allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Products in their operands' dtype: no autocast and, for ``"highest"``, no TF32 or bf16."""
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if precision == "highest":
            switch = _CUDA if device.type == "cuda" else _CPU
            if switch.enter():
                stack.callback(switch.leave)
        yield


class _Switch:
    """Torch's setting for float32 products on a kind of device, which the whole process shares.

    It is "ieee" while any thread is inside; the last to leave restores what the first one found.
    """

    def __init__(self, library: Any) -> None:
        self._matmul = library.matmul
        self._lock = threading.Lock()
        self._inside = 0
        self._before = "none"

    def enter(self) -> bool:
        """Whether the setting is held, so that ``leave`` must follow."""
        with self._lock:
            if not self._inside:
                before = self._matmul.fp32_precision
                if before in ("ieee", "none"):
                    return False
                # The value read may be inherited, and written back it would be inherited no longer.
                self._matmul.fp32_precision = "none"
                inherited = self._matmul.fp32_precision == before
                self._before = "none" if inherited else before
                self._matmul.fp32_precision = "ieee"
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._matmul.fp32_precision = self._before


_CUDA, _CPU = _Switch(torch.backends.cuda), _Switch(torch.backends.mkldnn)
