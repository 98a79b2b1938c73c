"""The second moments that every measure is made of, public and differentiable.

What all functions share, and the alphabet of dimensions, stands in :mod:`rift_kernels.functional`.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple, overload

from torch import Tensor

from . import autograd, checks, plan, shared_batch
from .checks import Features, Mask
from .ranks import Group, Ranks


class SecondMoments(NamedTuple):
    """Counts, means and centered second moments of student X and teacher Y.

    ``count (...)``, float64, no gradient; ``student_mean (..., D1)``, ``teacher_mean (..., D2)``;
    ``student = Xc^T Xc (..., D1, D1)``, ``cross = Xc^T Yc (..., D1, D2)``,
    ``teacher = Yc^T Yc (..., D2, D2)``: sums, not divided by the count.
    """

    count: Tensor  # type: ignore[assignment]
    student_mean: Tensor
    teacher_mean: Tensor
    student: Tensor
    cross: Tensor
    teacher: Tensor


@overload
def cross_covariance(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Mask = ...,
    correction: int = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> Tensor: ...


@overload
def cross_covariance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Mask = ...,
    correction: int = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> list[Tensor]: ...


def cross_covariance(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    correction: int = 1,
    precision: str = "high",
    backend: str = "auto",
    group: Group = None,
) -> Tensor | list[Tensor]:
    """Centered cross-covariance ``Xc^T Yc / (n - correction)``.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l).
        mask: boolean (..., N), True = valid; n >= 2 and n > ``correction``.
        correction: 1 for the unbiased estimate, 0 to divide by n.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (..., D1, D2), or a list of (D1_l, D2_l). Differentiable in both inputs.
    """
    if isinstance(correction, bool) or not isinstance(correction, numbers.Integral):
        raise TypeError(f"correction must be an integer; got {correction!r}")
    if correction < 0:
        raise ValueError(f"correction must not be negative; got {correction}")
    min_rows = max(2, correction + 1)
    settings = (f"cross_covariance, {correction}", precision)
    given, ranks = _given(student, teacher, mask, min_rows, group, settings)
    moments = of_layers(given, ranks, "xy", precision, backend)
    results = []
    for layer in moments:
        divisor = (layer.count - correction).to(layer.cross.dtype)[..., None, None]
        divisor = divisor.masked_fill(divisor <= 0, float("nan"))
        results.append(layer.cross / divisor)
    return results[0] if isinstance(student, Tensor) else results


@overload
def second_moments(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Mask = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> SecondMoments: ...


@overload
def second_moments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Mask = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> list[SecondMoments]: ...


def second_moments(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    precision: str = "high",
    backend: str = "auto",
    group: Group = None,
) -> SecondMoments | list[SecondMoments]:
    """Count, means and the centered second moments that every measure here is made of.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l).
        mask: boolean (..., N), True = valid; n >= 2.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        :class:`SecondMoments`, or a list of them. All but the count are differentiable.
    """
    given, ranks = _given(student, teacher, mask, 2, group, ("second_moments", precision))
    moments = of_layers(given, ranks, "xx xy yy", precision, backend)
    return moments[0] if isinstance(student, Tensor) else moments


def _given(
    student: Features,
    teacher: Features,
    mask: Mask,
    min_rows: int,
    group: Group,
    settings: tuple[str, str],
) -> tuple[checks.Layers, Ranks | None]:
    checks.option("precision", settings[1], checks.PRECISIONS)

    def check() -> checks.Layers:
        return checks.layers(student, teacher, mask, equal_widths=False)

    return shared_batch.share(group, check, min_rows, settings)


def of_layers(
    given: checks.Layers, ranks: Ranks | None, wanted: str, precision: str, backend: str
) -> list[SecondMoments]:
    """The moments of checked layers; blocks that are not ``wanted`` are empty."""
    rows, width = given.students[0].shape[-2:]
    problem = plan.Problem("moments", (), rows, width)

    def by(chosen: str) -> list[SecondMoments]:
        results = []
        for i, (x, y) in enumerate(given.pairs):
            how = (given.mask(i), wanted, precision, chosen, ranks, backend)
            mean_x, mean_y, count, *blocks = autograd.moments(x, y, *how)
            results.append(SecondMoments(count, mean_x, mean_y, *blocks))
        return results

    device, alone = given.teachers[0].device, ranks is None
    # Of ranks that talk to one another, none can do so once more by itself.
    return plan.run(by, backend, device, given.dtypes, problem, repeatable=alone)
