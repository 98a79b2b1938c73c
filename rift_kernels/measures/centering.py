"""What is done to features on any backend: centering before a measure, the gradient after it.

    center, row_energy           before the blocks of second moments
    mean_over_ranks, subtract    the former where ranks share the rows
    features_bwd                 grad_X = Xc P + Yc R^T + w * Xc + b + U V from blocks of
                                 coefficients, or M Xc + ... in Gram form

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
    left: Tensor | None,
    right: Tensor | None,
    gram: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a value with respect to one side's features.

    ``scale * (own P + other R^T + w * own + bias + left right)``, and 0 in masked rows; in Gram
    form the blocks multiply from the left. Nothing is left to be centered: what these terms move
    together is part of the bias, or of the product of low rank.

    Args:
        backend: multiplies.
        scale: the incoming gradient, (...).
        own, other: centered features of this side and of the other one, (..., N, D).
        own_block: P (D, D), or in Gram form M (N, N).
        cross_block: R (D, D_other), or in Gram form (N, N).
        weight: w, one number (..., 1) or one per row (..., N).
        bias: a constant added to every valid row, (..., D).
        left, right: factors of a product of low rank, (..., N, k) and (..., k, D).
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
    if left is not None and right is not None:
        right = right * scale_blocks
        grad = grad.addmm_(left, right) if grad.dim() == 2 else grad.add_(left @ right)
    if mask is not None:
        # Last, so that it is 0 whatever comes in.
        grad.masked_fill_(~mask.unsqueeze(-1), 0.0)
    return grad.to(dtype)
