"""Rows minus their mean, on one process or many; any leading axes, in float32 or float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sums_over_ranks import sum_over_ranks


def subtract_own_mean(
    x: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The valid rows minus their mean, that mean (..., D), and their count (...).

    Masked rows become exact zeros, whatever they held. The mean is subtracted twice: the second
    pass removes the rounding error of the first and makes a constant column exactly 0. So no
    variance differs from little variance without a threshold.
    """
    x = x.to(dtype)
    if mask is None:
        count = torch.full(x.shape[:-2], x.shape[-2], dtype=torch.float64, device=x.device)
        mean = x.mean(-2, keepdim=True)
        centered = x - mean
        residual = centered.mean(-2, keepdim=True)
        centered -= residual
    else:
        masked = ~mask.unsqueeze(-1)
        count = mask.sum(-1, dtype=torch.float64)
        divisor = count.to(dtype)[..., None, None]
        x = x.masked_fill(masked, 0.0)
        mean = x.sum(-2, keepdim=True) / divisor
        centered = (x - mean).masked_fill_(masked, 0.0)
        residual = centered.sum(-2, keepdim=True) / divisor
        centered = centered.sub_(residual).masked_fill_(masked, 0.0)
    return centered, (mean + residual).squeeze(-2), count


def means_over_ranks(
    sides: list[Tensor],
    mask: Tensor | None,
    ranks: Any,
    *extra: Tensor,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Float64 means (..., D) of the rows on all ranks; this rank may have none.

    Args:
        extra: tensors to sum in the same message.

    Returns:
        One mean per side, the count over all ranks, and the sums of ``extra``.
    """
    if mask is None:
        shape, device = sides[0].shape[:-1], sides[0].device
        count = torch.full(shape[:-1], shape[-1], dtype=torch.float64, device=device)
    else:
        count = mask.sum(-1, dtype=torch.float64)
        sides = [side.masked_fill(~mask.unsqueeze(-1), 0.0) for side in sides]
    count, *sums = sum_over_ranks(
        ranks, count, *(side.sum(-2, dtype=torch.float64) for side in sides), *extra
    )()
    means = [side_sum / count.unsqueeze(-1) for side_sum in sums[: len(sides)]]
    return means, count, sums[len(sides) :]


def subtract_mean(side: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """Valid rows minus a float64 mean, 0 elsewhere; a constant column becomes exactly 0."""
    # In two parts, because a mean far from 0 needs more digits than the dtype has.
    high = mean.to(side.dtype)
    low = (mean - high).to(side.dtype)
    centered = side - high.unsqueeze(-2) - low.unsqueeze(-2)
    return centered if mask is None else centered.masked_fill_(~mask.unsqueeze(-1), 0.0)


def row_energy(centered: Tensor) -> Tensor:
    """``||x_i||^2`` of every row, (..., N), summed in float64."""
    return torch.linalg.vector_norm(centered, dim=-1, dtype=torch.float64).square_()
