"""The primitives in plain PyTorch, on CPU and CUDA tensors, computing in float32 or float64.

A backend has

- :func:`moments`: the blocks ``xx, xy, yy`` of second moments of centered features, either over the
  rows (covariance form, D x D) or over the columns (Gram form, N x N);
- :func:`product`, :func:`product_transposed` and :func:`symmetric`, matrix products.

All take any leading axes. Second moments of 2-d inputs cost little more than half of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a symmetric product that are computed at once: narrower ones cost speed, wider ones
# repeat more below the diagonal.
PANEL = 128
# Multiplications from which oneDNN's own overhead no longer counts.
ONEDNN_PRODUCT = 2**24


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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    return a @ b


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` where that is known to be symmetric."""
    return a @ b


def product_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T``; large float32 ones on a CPU by oneDNN.

    torch.mm takes MKL there, which is slower on processors that are not Intel's; the operator is
    the one that torch's own compiler calls for linear layers.
    """
    large = a.dim() == 2 and a.shape[0] * b.shape[0] * b.shape[1] >= ONEDNN_PRODUCT
    on_cpu = a.device.type == "cpu" and a.dtype == torch.float32
    if large and on_cpu and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT
