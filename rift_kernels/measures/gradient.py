"""From coefficients to the gradient of one side's features."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


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
