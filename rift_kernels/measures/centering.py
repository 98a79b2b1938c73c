"""Rows about their mean, on one process or on many; any leading axes, in float32 or float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Alone:
    """The rows of one process are all there are; see ``dispatch.ranks.Ranks``."""

    @staticmethod
    def total(*sums: Tensor | None) -> Callable[[], tuple[Any, ...]]:
        """Begin to sum over ranks, and return what waits for the sums."""
        return lambda: sums

    blocks = total  # of second moments


def center(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Select the valid rows, subtract their mean: centered rows, mean (..., D), count (...).

    Masked rows become exact zeros, whatever they held. The mean is subtracted twice: the second
    pass removes what rounding left of the first, and makes a constant column exactly 0, so that
    "no variance" can be told from "little variance" without a threshold.
    """
    x = x.to(dtype)
    if mask is None:
        count = torch.full(x.shape[:-2], x.shape[-2], dtype=torch.float64, device=x.device)
        mean = x.mean(-2, keepdim=True)
        centered = x - mean
        rest = centered.mean(-2, keepdim=True)
        centered -= rest
    else:
        masked = ~mask.unsqueeze(-1)
        count = mask.sum(-1, dtype=torch.float64)
        divisor = count.to(dtype)[..., None, None]
        x = x.masked_fill(masked, 0.0)
        mean = x.sum(-2, keepdim=True) / divisor
        centered = (x - mean).masked_fill_(masked, 0.0)
        rest = centered.sum(-2, keepdim=True) / divisor
        centered = centered.sub_(rest).masked_fill_(masked, 0.0)
    return centered, (mean + rest).squeeze(-2), count


def mean_over_ranks(
    sides: list[Tensor],
    mask: Tensor | None,
    total: Callable[..., Callable[[], tuple[Any, ...]]],
    *more: Tensor,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Means (..., D) of all ranks' rows, of which this rank may have none; in float64.

    Args:
        total: sums over ranks.
        more: what is summed with the same message.

    Returns:
        A mean a side, the count of all ranks, and the sums of ``more``.
    """
    if mask is None:
        shape, device = sides[0].shape[:-1], sides[0].device
        count = torch.full(shape[:-1], shape[-1], dtype=torch.float64, device=device)
    else:
        count = mask.sum(-1, dtype=torch.float64)
        sides = [side.masked_fill(~mask.unsqueeze(-1), 0.0) for side in sides]
    count, *sums = total(count, *(side.sum(-2, dtype=torch.float64) for side in sides), *more)()
    means = [of_side / count.unsqueeze(-1) for of_side in sums[: len(sides)]]
    return means, count, sums[len(sides) :]


def subtract(side: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """Valid rows about a float64 mean, 0 elsewhere; a constant column becomes exactly 0."""
    # In two parts, so that a mean far from 0 is taken off to more digits than the dtype has.
    high = mean.to(side.dtype)
    low = (mean - high).to(side.dtype)
    centered = side - high.unsqueeze(-2) - low.unsqueeze(-2)
    return centered if mask is None else centered.masked_fill_(~mask.unsqueeze(-1), 0.0)


def row_energy(centered: Tensor) -> Tensor:
    """``||x_i||^2`` of every row, summed in float64: (..., N)."""
    return torch.linalg.vector_norm(centered, dim=-1, dtype=torch.float64).square_()
