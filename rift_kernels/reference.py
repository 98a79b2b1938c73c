"""The oracle: each measure computed naively from its definition, with native autograd.

It shares no code with the rest of the package, so it cannot share a defect. Values and gradients
are correct in float64; lower precision exposes every numerical problem that the package avoids.
Names, arguments and meaning are those of :mod:`rift_kernels.functional`. ``method``, ``precision``,
``backend``, ``group``, statistics, the checks and empty batches are missing. Masked rows are
removed with ``features[mask]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Features = Tensor | Sequence[Tensor]
Mask = Tensor | Sequence[Tensor] | None


def linear_cka(
    student: Features, teacher: Features, *, mask: Mask = None, debiased: bool = True
) -> Tensor:
    """``H(X, Y) / sqrt(H(X, X) H(Y, Y))``, H the biased or the unbiased estimator of HSIC."""
    hsic = _hsic_unbiased if debiased else _hsic_biased

    def value(x: Tensor, y: Tensor) -> Tensor:
        k, l = x @ x.T, y @ y.T  # noqa: E741 (the literature's names)
        return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()

    return _each_layer(value, student, teacher, mask)


def procrustes_similarity(student: Features, teacher: Features, *, mask: Mask = None) -> Tensor:
    """``||Xc^T Yc||_* / (||Xc|| ||Yc||)`` by singular values."""

    def value(x: Tensor, y: Tensor) -> Tensor:
        x, y = _centered(x), _centered(y)
        return torch.linalg.svdvals(x.T @ y).sum() / (x.norm() * y.norm())

    return _each_layer(value, student, teacher, mask)


def covariance_distance(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    scale: str = "relative",
    mean_weight: float = 0.0,
    rotation: Features | None = None,
) -> Tensor:
    """``||S_s - Q^T S_t Q||^2 * scale + mean_weight * ||mu_s - mu_t Q||^2``."""

    def value(x: Tensor, y: Tensor, q: Tensor | None = None) -> Tensor:
        covariance_x, covariance_y = (_centered(z).T @ _centered(z) / (len(z) - 1) for z in (x, y))
        mean_y = y.mean(0)
        if q is not None:
            covariance_y = q.T @ covariance_y @ q
            mean_y = mean_y @ q
        distance = (covariance_x - covariance_y).square().sum()
        if scale == "relative":
            distance = distance / covariance_y.square().sum()
        elif scale == "coral":
            distance = distance / (4 * x.shape[1] ** 2)
        return distance + mean_weight * (x.mean(0) - mean_y).square().sum()

    if rotation is None or isinstance(rotation, Tensor):
        return _each_layer(partial(value, q=rotation), student, teacher, mask)
    layers = zip(*_lists(student, teacher, mask), rotation, strict=True)
    return torch.stack([_each_layer(partial(value, q=q), x, y, m) for x, y, m, q in layers])


def bures_distance(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    squared: bool = True,
    mean_weight: float = 0.0,
) -> Tensor:
    """``tr(S_s) + tr(S_t) - 2 tr((S_s^1/2 S_t S_s^1/2)^1/2)``, plus the means.

    The last trace is the nuclear norm of ``Xc Yc^T / (n-1)``. Its singular values are
    differentiable where the square root of a singular covariance is not.
    """

    def value(x: Tensor, y: Tensor) -> Tensor:
        mean_term = mean_weight * (x.mean(0) - y.mean(0)).square().sum()
        x, y = _centered(x), _centered(y)
        nuclear_norm = torch.linalg.svdvals(x @ y.T).sum()
        traces = x.square().sum() + y.square().sum()
        distance = (traces - 2 * nuclear_norm) / (len(x) - 1) + mean_term
        return distance if squared else distance.sqrt()

    return _each_layer(value, student, teacher, mask)


def cross_covariance(
    student: Features, teacher: Features, *, mask: Mask = None, correction: int = 1
) -> Any:
    """``Xc^T Yc / (n - correction)``."""
    if not isinstance(student, Tensor):
        layers = zip(*_lists(student, teacher, mask), strict=True)
        return [cross_covariance(x, y, mask=m, correction=correction) for x, y, m in layers]

    def value(x: Tensor, y: Tensor) -> Tensor:
        return _centered(x).T @ _centered(y) / (len(x) - correction)

    return _each_layer(value, student, teacher, mask)


def second_moments(student: Features, teacher: Features, *, mask: Mask = None) -> Any:
    """``count, mean_x, mean_y, Xc^T Xc, Xc^T Yc, Yc^T Yc``."""
    if not isinstance(student, Tensor):
        layers = zip(*_lists(student, teacher, mask), strict=True)
        return [second_moments(x, y, mask=m) for x, y, m in layers]
    functions = (
        lambda x, _: torch.tensor(float(len(x)), dtype=torch.float64, device=x.device),
        lambda x, _: x.mean(0),
        lambda _, y: y.mean(0),
        lambda x, _: _centered(x).T @ _centered(x),
        lambda x, y: _centered(x).T @ _centered(y),
        lambda _, y: _centered(y).T @ _centered(y),
    )
    return tuple(_each_layer(value, student, teacher, mask) for value in functions)


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _hsic_biased(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """``tr(K H L H) / (n-1)^2`` (Gretton et al. 2005)."""
    n = len(k)
    h = torch.eye(n, dtype=k.dtype, device=k.device) - 1 / n
    return torch.trace(k @ h @ l @ h) / (n - 1) ** 2


def _hsic_unbiased(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """HSIC_1 of Song et al. 2012, from Gram matrices with the diagonal set to zero."""
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    product = torch.trace(k @ l)
    sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (k @ l).sum()
    return (product + sums - mixed) / (n * (n - 3))


def _each_layer(value: Callable[..., Tensor], student: Any, teacher: Any, mask: Any) -> Tensor:
    """The values of all layers, in the shape of the leading axes."""
    if isinstance(student, Tensor) and student.dim() == 2:
        x, y = (student, teacher) if mask is None else (student[mask], teacher[mask])
        return value(x, y)
    layers = zip(*_lists(student, teacher, mask), strict=True)
    return torch.stack([_each_layer(value, x, y, m) for x, y, m in layers])


def _lists(student: Any, teacher: Any, mask: Any) -> tuple[Any, Any, Any]:
    """Students, teachers and masks, one of each for every layer."""
    is_shared = mask is None or (not isinstance(student, Tensor) and isinstance(mask, Tensor))
    return student, teacher, [mask] * len(student) if is_shared else mask
