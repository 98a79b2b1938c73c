"""From coefficients to the gradient of one side's features."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def features_bwd(
    primitives: ModuleType,
    scale: Tensor,
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    block: Tensor | None,
    cross_block: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    gram: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a value with respect to one side's features.

    ``scale * (x P + y R^T + w * x + b + left right)``, and 0 in masked rows; in Gram form the
    blocks multiply from the left. The sum needs no centering: the bias and the product of low rank
    contain all that shifts the rows together.

    Args:
        primitives: a module with the products, such as ``backends.eager``.
        scale: the incoming gradient, (...).
        x, y: centered features of this side and of the other side, (..., N, D).
        block: P (D, D), or in Gram form M (N, N).
        cross_block: R (D, D_other), or in Gram form (N, N).
        weight: w, one number (..., 1) or one per row (..., N).
        bias: b, a constant added to every valid row, (..., D).
        left, right: factors of a product of low rank, (..., N, k) and (..., k, D).
        dtype: of the result.
    """
    if block is not None and block.dtype != x.dtype:
        # Entries of a transport map can be so large that their products cancel only in float64.
        x, y = x.to(block.dtype), y.to(block.dtype)
    # Blocks are smaller than features, so the incoming gradient multiplies them.
    scale = scale.to(x.dtype)
    scale_blocks, scale_rows = scale[..., None, None], scale[..., None]
    grad = None
    for features, factor in ((x, block), (y, cross_block)):
        if factor is None:
            continue
        factor = factor * scale_blocks
        product = (
            primitives.product(factor, features)
            if gram
            else primitives.product_transposed(features, factor)
        )
        grad = product if grad is None else grad.add_(product)
    if grad is None:
        grad = torch.zeros_like(x)
    if weight is not None:
        weight = weight * scale_rows
        grad.addcmul_(x, weight.unsqueeze(-1))
    if bias is not None:
        grad += (bias * scale_rows).unsqueeze(-2)
    if left is not None and right is not None:
        right = right * scale_blocks
        grad = grad.addmm_(left, right) if grad.dim() == 2 else grad.add_(left @ right)
    if mask is not None:
        # Last, so that masked rows are 0 whatever the incoming gradient is.
        grad.masked_fill_(~mask.unsqueeze(-1), 0.0)
    return grad.to(dtype)
