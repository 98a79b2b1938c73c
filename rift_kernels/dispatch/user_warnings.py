"""Warnings that point at the user's line, not at one of this package or of torch."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

# A module's call goes through torch, so a fixed number of frames would end there.
_SKIPPED = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent)
)


def warn(message: str) -> None:
    """Warn at the nearest caller outside, as ``skip_file_prefixes`` does from Python 3.12 on."""
    if torch.compiler.is_compiling():  # which cannot trace frames
        warnings.warn(message, stacklevel=2)
        return
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
