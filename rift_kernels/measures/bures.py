"""Bures distance: value and coefficients of the gradient."""

from __future__ import annotations

from types import ModuleType

import torch

from . import duals
from .centering import CenteredFeatures
from .coefficients import (
    Coefficients,
    NeedsGrad,
    ValueAndCoefficients,
    mean_term,
    nan_below,
    plus_diagonal_,
    safe_inverse,
    scale_,
    times,
)
from .row_means import row_energy
from .sums_over_ranks import sum_over_ranks


def bures(
    features: CenteredFeatures,
    primitives: ModuleType,
    gram: bool,
    needs_grad: NeedsGrad,
    squared: bool,
    mean_weight: float,
    method: str,
) -> ValueAndCoefficients:
    """2-Wasserstein distance of two Gaussians.

    The cross term is the fidelity of the covariances; in Gram form it is the nuclear norm of
    ``Xc Yc^T``, which is bounded where a covariance is singular.
    """
    exact = method == "eigh"
    inverse_n = 1 / (features.count - 1)
    (traces,) = sum_over_ranks(
        features.ranks, row_energy(features.x).sum(-1) + row_energy(features.y).sum(-1)
    )()
    # Both terms in float64: close to the teacher the distance is a small difference of them.
    if gram:
        features64 = features._replace(x=features.x.double(), y=features.y.double())
        factor, cross = duals.polar(features64, primitives, gram, exact)
    else:
        forth, back, cross = duals.transport(features, primitives, gram, exact)
    # Rounding can make a distance of 0 slightly negative; clamp keeps NaN.
    value = ((traces - 2 * cross) * inverse_n).clamp(min=0)
    mean_value, bias = mean_term(features, mean_weight)
    value = nan_below(value + mean_value, features.count, 2)
    outer = torch.ones_like(value)
    if not squared:
        value = value.sqrt()
        outer = 0.5 * safe_inverse(value)
    scale = 2 * outer * inverse_n
    dtype = features.x.dtype
    if bias is not None:
        bias = bias * outer.unsqueeze(-1).to(dtype)
    if gram:
        weight = scale.to(dtype).unsqueeze(-1)
        blocks = Coefficients(xy=times(factor, -scale).to(dtype), wx=weight, wy=weight.clone())
    else:
        blocks = Coefficients(
            xx=scale_(plus_diagonal_(forth, -1.0), -scale) if needs_grad.student else None,
            yy=scale_(plus_diagonal_(back, -1.0), -scale) if needs_grad.teacher else None,
        )
    return value, blocks._replace(bx=bias, by=None if bias is None else -bias)
