"""Both sides of a layer about their means: what every measure begins with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import long_rows, row_means
from .long_rows import LongRows


class CenteredFeatures(NamedTuple):
    """The centered features of one layer; leading axes are a batch."""

    x: Tensor  # (..., N, D1), centered, masked rows zero
    y: Tensor  # (..., N, D2)
    mean_x: Tensor  # (..., D1)
    mean_y: Tensor  # (..., D2)
    count: Tensor  # type: ignore[assignment]  # (...), float64: the number of valid rows
    mask: Tensor | None  # (..., N), True = valid
    ranks: Any = None  # the processes that have the other rows, a dispatch.ranks.Ranks
    # Rows so long that debiasing would cancel: x and y are 0 there, minus the mean of the others.
    long: LongRows | None = None


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32."""
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def center(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    ranks: Any = None,
    exclude_long_rows: bool = False,
) -> CenteredFeatures:
    """Both sides minus the mean of all rows on all ranks, or of all but the longest rows."""
    dtype = compute_dtype(student, teacher)
    if exclude_long_rows:
        sides = [student, teacher]
        (x, y), (mean_x, mean_y), count, long = long_rows.separate(sides, mask, dtype, ranks)
        return CenteredFeatures(x, y, mean_x, mean_y, count, mask, ranks, long)
    if ranks is not None:
        sides = [student.to(dtype), teacher.to(dtype)]
        means, count, _ = row_means.means_over_ranks(sides, mask, ranks)
        x, y = (row_means.subtract_mean(*side, mask) for side in zip(sides, means, strict=True))
        mean_x, mean_y = (mean.to(dtype) for mean in means)
        return CenteredFeatures(x, y, mean_x, mean_y, count, mask, ranks)
    x, mean_x, count = row_means.subtract_own_mean(student, mask, dtype)
    y, mean_y, _ = row_means.subtract_own_mean(teacher, mask, dtype)
    return CenteredFeatures(x, y, mean_x, mean_y, count, mask)
