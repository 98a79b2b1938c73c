"""What ours is compared with, written here: naive eager code, and a backward derived by hand.

The naive functions are what one writes from the formulas, for two features (N, D), with native
autograd. They have the weaknesses of such code: sums in the features' dtype, a debiased CKA that
does not center first, and for the Bures distance the square root of a covariance, which has no
derivative where the covariance is singular (N <= D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cka_biased(x: Tensor, y: Tensor) -> Tensor:
    xc, yc = x - x.mean(0), y - y.mean(0)
    c, a, b = xc.T @ yc, xc.T @ xc, yc.T @ yc
    return (c**2).sum() / (a.norm() * b.norm())


def cka_debiased(x: Tensor, y: Tensor) -> Tensor:
    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 (the literature's names)
        means = k.sum() * l.sum() / ((n - 1) * (n - 2))
        return ((k * l).sum() + means - 2 / (n - 2) * (k.sum(0) @ l.sum(0))) / (n * (n - 3))

    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    xc, yc = x - x.mean(0), y - y.mean(0)
    return torch.linalg.svdvals(xc.T @ yc).sum() / (xc.norm() * yc.norm())


def covariance(x: Tensor, y: Tensor) -> Tensor:
    a, b = torch.cov(x.T), torch.cov(y.T)
    return ((a - b) ** 2).sum() / (b**2).sum()


def bures(x: Tensor, y: Tensor) -> Tensor:
    a, b = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return a.trace() + b.trace() - 2 * cross


NAIVE = {f.__name__: f for f in (cka_biased, cka_debiased, procrustes, covariance, bures)}


class HandDerivedCKA(torch.autograd.Function):
    """Biased, by five plain products with float32 sums; differentiable in x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        xc, yc = _centered(x), _centered(y)
        c, a, b = _product(xc.T, yc), _product(xc.T, xc), _product(yc.T, yc)
        norm_a, norm_b = a.norm(), b.norm()
        value = c.square().sum() / (norm_a * norm_b)
        ctx.save_for_backward(xc, yc, a, c, norm_a, norm_b, value)
        ctx.dtype = x.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None]:
        xc, yc, a, c, norm_a, norm_b, value = ctx.saved_tensors
        alpha = -2 * grad_value * value / norm_a**2
        beta = 2 * grad_value / (norm_a * norm_b)
        grad = _product(xc, (alpha * a).to(xc.dtype))
        grad += _product(yc, (beta * c.T).to(xc.dtype))
        return grad.to(ctx.dtype), None


def _centered(x: Tensor) -> Tensor:
    centered = x.float() - x.float().mean(0)
    # Only cuBLAS multiplies half operands into a float32 result.
    return centered.to(x.dtype) if x.is_cuda else centered


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
