"""Covariance distance: value and coefficients of the gradient."""

from __future__ import annotations

from types import ModuleType

import torch

from .centering import CenteredFeatures
from .coefficients import (
    Coefficients,
    NeedsGrad,
    ValueAndCoefficients,
    inner,
    mean_term,
    nan_below,
    norm,
    safe_inverse,
    times,
)
from .sums_over_ranks import sum_blocks_over_ranks


def covariance(
    features: CenteredFeatures,
    primitives: ModuleType,
    gram: bool,
    needs_grad: NeedsGrad,
    scale: str,
    mean_weight: float,
) -> ValueAndCoefficients:
    """``||S_s - S_t||^2``, divided by ``||S_t||^2``, by ``4 D^2``, or by nothing.

    The Gram form works on ``U = Xc - Yc`` and ``V = Xc + Yc``, because then
    ``||S_s - S_t||^2 = (<U U^T, V V^T> + <U V^T, V U^T>) / 2 (n-1)^2`` is small with U, while
    ``||Kx||^2 - 2 ||Xc Yc^T||^2 + ||Ky||^2`` is a difference of large numbers.
    """
    inverse_n = 1 / (features.count - 1)
    if gram:
        uu, uv, vv = primitives.moments(
            features.x - features.y, features.x + features.y, gram, "xx xy yy"
        )
        crossed = uv + uv.mT
        yy = (uu + vv - crossed) / 4
        # Tensor cores leave rounding where terms cancel, so constant sides are looked for directly.
        is_constant_x, is_constant_y = (
            (side == 0).flatten(-2).all(-1) for side in (features.x, features.y)
        )
        norm_y = norm(yy).masked_fill(is_constant_y, 0.0)
    else:
        xx, _, yy = sum_blocks_over_ranks(
            features.ranks, *primitives.moments(features.x, features.y, gram, "xx yy")
        )()
        difference = xx - yy
        norm_y = norm(yy)
    if scale == "relative":
        inverse_unit = safe_inverse(norm_y)
    else:
        unit = 2 * features.x.shape[-1] if scale == "coral" else 1
        inverse_unit = inverse_n / unit
    if gram:
        uu, vv, uv = (times(block, inverse_unit) for block in (uu, vv, uv))
        value = (0.5 * (inner(uu, vv) + inner(uv, uv.mT))).clamp(min=0)
    else:
        difference = times(difference, inverse_unit)
        value = norm(difference).square()
    mean_value, bias = mean_term(features, mean_weight)
    # The teacher's norm in the denominator adds this to its gradient.
    denominator = value if scale == "relative" else torch.zeros_like(value)
    outer = nan_below(4 * inverse_unit, features.count, 2)
    value = nan_below(value + mean_value, features.count, 2)
    yy = times(yy, inverse_unit)
    if gram:
        crossed = uv + uv.mT
        coefficients = Coefficients(
            xx=times((uu + vv + crossed) / 4, outer) if needs_grad.student else None,
            # The block -Xc Yc^T.
            xy=times((uu - vv - uv + uv.mT) / 4, outer).masked_fill(
                (is_constant_x | is_constant_y)[..., None, None], 0.0
            ),
            yy=times(yy, outer * (1 - denominator)) if needs_grad.teacher else None,
        )
    else:
        coefficients = Coefficients(
            xx=times(difference, outer) if needs_grad.student else None,
            yy=-times(difference + times(yy, denominator), outer) if needs_grad.teacher else None,
        )
    return value, coefficients._replace(bx=bias, by=None if bias is None else -bias)
