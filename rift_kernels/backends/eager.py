"""The primitives in plain PyTorch, on CPU and CUDA tensors, in float32 or float64.

A backend has these primitives, fused measures (as ``cuda`` has alone), or both:

- :func:`moments`: the blocks ``xx, xy, yy`` of second moments of centered features, summed over
  rows (covariance form, D x D) or columns (Gram form, N x N);
- :func:`product`, :func:`product_transposed` and :func:`product_symmetric`: matrix products.

All take any leading axes. Second moments of 2-d inputs cost little more than half a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a symmetric product that are computed at once: narrower panels are slower, wider ones
# compute more below the diagonal twice.
PANEL = 128
# From so many multiplications on, oneDNN's overhead is negligible.
ONEDNN_PRODUCT = 2**24


def moments(x: Tensor, y: Tensor, gram: bool, block_names: str) -> tuple[Tensor | None, ...]:
    """The blocks in ``block_names`` ("xx", "xy", "yy") of second moments of centered features.

    Covariance form: ``x^T x (D1, D1)``, ``x^T y (D1, D2)``, ``y^T y (D2, D2)``.
    Gram form: ``x x^T``, ``x y^T``, ``y y^T``, all (N, N).
    """
    if gram:
        x, y = x.mT, y.mT
    return (
        self_product(x) if "xx" in block_names else None,
        x.mT @ y if "xy" in block_names else None,
        self_product(y) if "yy" in block_names else None,
    )


def self_product(z: Tensor) -> Tensor:
    """``z^T z``; for 2-d input in panels of columns, each computed only down to the diagonal."""
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    return a @ b


def product_symmetric(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, which is known to be symmetric."""
    return a @ b


def product_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T``; oneDNN computes large float32 products on a CPU.

    torch.mm uses MKL there, which is slower on processors other than Intel's. The operator is the
    one that torch's compiler calls for linear layers.
    """
    is_large = a.dim() == 2 and a.shape[0] * b.shape[0] * b.shape[1] >= ONEDNN_PRODUCT
    is_float32_on_cpu = a.device.type == "cpu" and a.dtype == torch.float32
    if is_large and is_float32_on_cpu and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT
