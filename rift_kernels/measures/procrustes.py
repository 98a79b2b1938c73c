"""Procrustes similarity: value and coefficients of the gradient."""

from __future__ import annotations

from types import ModuleType

from . import duals
from .centering import CenteredFeatures
from .coefficients import (
    Coefficients,
    NeedsGrad,
    ValueAndCoefficients,
    nan_below,
    plus_diagonal_,
    safe_inverse,
    scale_,
    similarity,
    times,
)
from .row_means import row_energy
from .sums_over_ranks import sum_over_ranks


def procrustes(
    features: CenteredFeatures,
    primitives: ModuleType,
    gram: bool,
    needs_grad: NeedsGrad,
    method: str,
    distance: bool,
) -> ValueAndCoefficients:
    """The nuclear norm of the cross-covariance, divided by the norms of the features.

    The nuclear norm is ``<C, polar(C)>``; in Gram form it is the fidelity of Kx and Ky.
    """
    exact = method == "svd"
    energy_x, energy_y = sum_over_ranks(
        features.ranks, row_energy(features.x).sum(-1), row_energy(features.y).sum(-1)
    )()
    inverse_x, inverse_y = safe_inverse(energy_x), safe_inverse(energy_y)
    scale = inverse_x.sqrt() * inverse_y.sqrt()
    if gram:
        forth, back, nuclear = duals.transport(features, primitives, gram, exact)
    else:
        factor, nuclear = duals.polar(features, primitives, gram, exact)
    value = nan_below(nuclear * scale, features.count, 2)
    result, sign = similarity(value, distance)
    scale = sign * scale
    weight_x, weight_y = -sign * value * inverse_x, -sign * value * inverse_y
    if gram:
        # The two terms nearly cancel, so they are added into one float64 matrix.
        return result, Coefficients(
            xx=plus_diagonal_(scale_(forth, scale), weight_x) if needs_grad.student else None,
            yy=plus_diagonal_(scale_(back, scale), weight_y) if needs_grad.teacher else None,
        )
    return result, Coefficients(
        xy=times(factor, scale).to(features.x.dtype),
        wx=weight_x.to(features.x.dtype).unsqueeze(-1),
        wy=weight_y.to(features.x.dtype).unsqueeze(-1),
    )
