"""Trust under torch.compile, which calls this while it traces and takes the answer as constant."""

from __future__ import annotations

from typing import Any

import torch

from . import decisions


@torch.compiler.assume_constant_result
def is_trusted(*kind: Any) -> bool:
    """See :func:`rift_kernels.trust.decisions.is_trusted`."""
    return decisions.is_trusted(decisions.Kind(*kind), tracing=True)
