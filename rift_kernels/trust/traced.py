"""What torch.compile is not to trace, but to ask once and take for a constant."""

from __future__ import annotations

from typing import Any

import torch

from . import decisions


@torch.compiler.assume_constant_result
def is_trusted(*kind: Any) -> bool:
    """See :func:`rift_kernels.trust.decisions.is_trusted`."""
    return decisions.is_trusted(kind, tracing=True)
