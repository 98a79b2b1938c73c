"""What is done to features on any backend: centering before a measure, the gradient after it.

    center, center_over_ranks, row_energy    before the blocks of second moments
    features_bwd          grad_X = Xc P + Yc R^T + w * Xc + b from blocks of coefficients,
                          or M Xc + ... + b in Gram form

All take any leading axes, and compute in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


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


def center_over_ranks(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    total: Callable[..., Callable[[], tuple[Any, ...]]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`center` about the means of all ranks' rows, of which this rank may have none.

    Sums are in float64: a constant column becomes exactly 0 here, too, in one message.

    Returns:
        Centered student and teacher, their means, and the count of all ranks.
    """
    sides = [student.to(dtype), teacher.to(dtype)]
    if mask is None:
        masked = None
        count = torch.full(
            student.shape[:-2], student.shape[-2], dtype=torch.float64, device=student.device
        )
    else:
        masked = ~mask.unsqueeze(-1)
        count = mask.sum(-1, dtype=torch.float64)
        sides = [side.masked_fill(masked, 0.0) for side in sides]
    count, *sums = total(count, *(side.sum(-2, dtype=torch.float64) for side in sides))()
    means = [of_side / count.unsqueeze(-1) for of_side in sums]
    for i, mean in enumerate(means):
        # In two parts, so that a mean far from 0 is taken off to more digits than dtype has.
        high = mean.to(dtype)
        low = (mean - high).to(dtype)
        centered = sides[i] - high.unsqueeze(-2) - low.unsqueeze(-2)
        sides[i] = centered if masked is None else centered.masked_fill_(masked, 0.0)
    return sides[0], sides[1], means[0].to(dtype), means[1].to(dtype), count


def row_energy(centered: Tensor) -> Tensor:
    """``||x_i||^2`` of every row, summed in float64: (..., N)."""
    return torch.linalg.vector_norm(centered, dim=-1, dtype=torch.float64).square_()


def features_bwd(
    backend: ModuleType,
    scale: Tensor,
    own: Tensor,
    other: Tensor,
    mask: Tensor | None,
    own_block: Tensor | None,
    cross_block: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gram: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a value with respect to one side's features.

    ``scale * (own P + other R^T + w * own + bias)``, and 0 in masked rows; in Gram form the blocks
    multiply from the left. Nothing is left to be centered: products with centered features are, and
    what unequal weights move is part of the bias.

    Args:
        backend: multiplies.
        scale: the incoming gradient, (...).
        own, other: centered features of this side and of the other one, (..., N, D).
        own_block: P (D, D), or in Gram form M (N, N).
        cross_block: R (D, D_other), or in Gram form (N, N).
        weight: w, one number (..., 1) or one per row (..., N).
        bias: a constant added to every valid row, (..., D).
        dtype: of the result.
    """
    if own_block is not None and own_block.dtype != own.dtype:
        # A transport map can hold entries so large that only float64 brings them together again.
        own, other = own.to(own_block.dtype), other.to(own_block.dtype)
    # Blocks are smaller than features, so the incoming gradient goes into them.
    scale = scale.to(own.dtype)
    scale_blocks, scale_rows = scale[..., None, None], scale[..., None]
    grad = None
    for features, block in ((own, own_block), (other, cross_block)):
        if block is None:
            continue
        block = block * scale_blocks
        product = (
            backend.product(block, features)
            if gram
            else backend.product_transposed(features, block)
        )
        grad = product if grad is None else grad.add_(product)
    if grad is None:
        grad = torch.zeros_like(own)
    if weight is not None:
        weight = weight * scale_rows
        grad.addcmul_(own, weight.unsqueeze(-1))
    if bias is not None:
        grad += (bias * scale_rows).unsqueeze(-2)
    if mask is not None:
        # Last, so that it is 0 whatever comes in.
        grad.masked_fill_(~mask.unsqueeze(-1), 0.0)
    return grad.to(dtype)
