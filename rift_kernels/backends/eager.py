"""The primitives in plain PyTorch, on CPU and CUDA tensors, computing in float32 or float64.

Two primitives serve every measure:

- :func:`center`, then :func:`moments` and :func:`row_energy`: the blocks ``xx, xy, yy`` of second
  moments of the centered features, either over the rows (covariance form, D x D) or over the
  columns (Gram form, N x N);
- :func:`features_bwd`: ``grad_X = center(Xc P + Yc R^T + w * Xc) + b`` from blocks of coefficients,
  or ``center(M Xc + ...) + b`` in Gram form.

All take any leading axes. Symmetric products of 2-d inputs cost little more than half of others.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a symmetric product that are computed at once: narrower ones cost speed, wider ones
# repeat more below the diagonal.
PANEL = 128
# Multiplications from which oneDNN's own overhead no longer counts.
ONEDNN_PRODUCT = 2**24


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


def row_energy(centered: Tensor) -> Tensor:
    """``||x_i||^2`` of every row, summed in float64: (..., N)."""
    return torch.linalg.vector_norm(centered, dim=-1, dtype=torch.float64).square_()


def moments(x: Tensor, y: Tensor, gram: bool, wanted: str) -> tuple[Tensor | None, ...]:
    """The blocks named in ``wanted`` ("xx", "xy", "yy") of second moments of centered features.

    Covariance form: ``x^T x (D1, D1)``, ``x^T y (D1, D2)``, ``y^T y (D2, D2)``.
    Gram form: ``x x^T``, ``x y^T``, ``y y^T``, all (N, N).
    """
    if gram:
        x, y = x.mT, y.mT
    return (
        symmetric_product(x) if "xx" in wanted else None,
        x.mT @ y if "xy" in wanted else None,
        symmetric_product(y) if "yy" in wanted else None,
    )


def symmetric_product(z: Tensor) -> Tensor:
    """``z^T z``; for 2-d input in panels of columns, of which only the upper part is multiplied."""
    width = z.shape[-1]
    if z.dim() > 2 or width <= PANEL:
        return z.mT @ z
    out = z.new_empty(width, width)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        above = out[:stop, start:stop]
        torch.mm(z[:, :stop].mT, z[:, start:stop], out=above)
        out[start:stop, :start].copy_(above[:start].mT)
    return out


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T``; large float32 ones on a CPU by oneDNN.

    torch.mm takes MKL there, which is slower on processors that are not Intel's; the operator is
    the one that torch's own compiler calls for linear layers.
    """
    large = a.dim() == 2 and a.shape[0] * b.shape[0] * b.shape[1] >= ONEDNN_PRODUCT
    on_cpu = a.device.type == "cpu" and a.dtype == torch.float32
    if large and on_cpu and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT


def features_bwd(
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

    ``scale * (center(own P + other R^T + w * own) + bias)``, and 0 in masked rows; in Gram form the
    blocks multiply from the left.

    Args:
        scale: the incoming gradient, (...).
        own, other: centered features of this side and of the other one, (..., N, D).
        own_block: P (D, D), or in Gram form M (N, N).
        cross_block: R (D, D_other), or in Gram form (N, N).
        weight: w, one number (..., 1) or one per row (..., N).
        bias: a constant added to every valid row, (..., D): the gradient with respect to a mean.
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
        product = block @ features if gram else _times_transposed(features, block)
        grad = product if grad is None else grad.add_(product)
    if grad is None:
        grad = torch.zeros_like(own)
    if weight is not None:
        weight = weight * scale_rows
        grad.addcmul_(own, weight.unsqueeze(-1))
        if weight.shape[-1] > 1:
            # Only unequal weights move the mean: every other term is made of centered columns.
            total = (weight.unsqueeze(-2) @ own).squeeze(-2)
            count = own.shape[-2] if mask is None else mask.sum(-1, keepdim=True).to(own.dtype)
            grad -= (total / count).unsqueeze(-2)
    if bias is not None:
        grad += (bias * scale_rows).unsqueeze(-2)
    if mask is not None:
        # Last, so that it is 0 whatever comes in.
        grad.masked_fill_(~mask.unsqueeze(-1), 0.0)
    return grad.to(dtype)
