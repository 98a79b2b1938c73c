"""Covariance distances that no operator computes: formed from covariances by native autograd.

The operators take two sets of features. This module serves the other distances: to a teacher known
by its statistics alone, at the best of all rotations, and at a rotation where ranks sum moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rift_kernels.measures.matrix_functions import eigenvalues
from rift_kernels.measures.row_means import subtract_own_mean

from . import autograd, checks, plan, second_moments, shared_batch
from .availability import Problem
from .checks import Features, Layers, Mask, Statistics
from .plan import Plan
from .ranks import Group, Ranks
from .rotations import rotate
from .second_moments import SecondMoments

Teacher = Features | Statistics | Sequence[Statistics]


class Gaussian(NamedTuple):
    """A mean (..., D) and a covariance (..., D, D)."""

    mean: Tensor
    covariance: Tensor


def covariance_distance(
    student: Features,
    teacher: Teacher,
    mask: Mask,
    scale: str,
    mean_weight: float,
    rotation: Features | str | None,
    debiased: bool,
    precision: str,
    backend: str,
    group: Group,
) -> Tensor:
    """:func:`rift_kernels.covariance_distance` to statistics, or at the best rotation."""
    checks.option("precision", precision, checks.PRECISIONS)
    optimal = isinstance(rotation, str)
    matrices = None if isinstance(rotation, str) else rotation
    if optimal:
        _only_spectra(rotation, mean_weight, backend)

    def check() -> Layers:
        if checks.is_features(teacher):
            return checks.layers(student, teacher, mask, equal_widths=True)
        layers = checks.layers(student, _one_column(student), mask, equal_widths=False)
        statistics = _statistics(teacher, layers, matrices)
        rotations = checks.rotations(matrices, layers, [stored.width for stored in statistics])
        return layers._replace(rotations=rotations, statistics=statistics)

    has_features = checks.is_features(teacher)
    debiased = debiased and not optimal and not has_features
    form = (optimal, matrices is not None, has_features, debiased)
    shared_settings = ("matching", scale, mean_weight, *form, precision)
    layers, ranks = shared_batch.share(group, check, 4 if debiased else 2, shared_settings)
    if optimal:
        values = _distances_of_spectra(layers, ranks, scale, precision, backend)
    else:
        estimate = _debiased if debiased else _biased
        values = []
        for i, stored in enumerate(layers.statistics):
            gaussian, unbiased = estimate(layers, i, ranks, precision, backend)
            target = _stored(stored, gaussian.covariance.dtype)
            q = layers.rotations[i] if layers.rotations else None
            values.append(_distance(gaussian, target, q, scale, mean_weight, precision, unbiased))
    return torch.stack(values) if layers.is_list else values[0]


def at_rotations(
    layers: Layers,
    ranks: Ranks,
    scale: str,
    mean_weight: float,
    precision: str,
    backend: str,
) -> Tensor:
    """The distance at the layers' rotations, from moments summed over ranks."""
    moments = second_moments.of_layers(layers, ranks, "xx yy", precision, backend)
    values = [
        _distance(_student(layer), _teacher(layer), q, scale, mean_weight, precision)
        for layer, q in zip(moments, layers.rotations, strict=True)
    ]
    return torch.stack(values) if layers.is_list else values[0]


def _only_spectra(rotation: object, mean_weight: float, backend: str) -> None:
    checks.option("rotation", rotation, ("optimal",))
    if mean_weight:
        raise ValueError(
            "mean_weight must be 0 for rotation='optimal', which considers the covariance alone; "
            f"got {mean_weight!r}"
        )
    if backend not in ("auto", "eager"):
        raise RuntimeError(
            f"backend={backend!r} cannot run: rotation='optimal' needs an eigendecomposition, "
            "which only the eager backend has"
        )


def _one_column(student: Features) -> Features:
    """A column of the student, to stand in for a teacher; anything but tensors, unchanged."""
    layers = [student] if isinstance(student, Tensor) else student
    if not isinstance(layers, list | tuple) or not all(isinstance(x, Tensor) for x in layers):
        return student
    columns = [x.detach()[..., :1] for x in layers]
    return columns[0] if isinstance(student, Tensor) else columns


def _statistics(teacher: Any, layers: Layers, rotation: Features | None) -> list[Statistics]:
    """Checked statistics, one per layer, of the student's width and on its device."""
    several = isinstance(teacher, list | tuple)
    statistics: list[Statistics] = list(teacher) if several else [teacher]
    if several != layers.is_list or len(statistics) != len(layers.students):
        raise ValueError(
            "teacher must be TeacherStatistics for a tensor, or a list with one per layer for a "
            f"list; got {f'a list of {len(statistics)}' if several else 'one'} for "
            f"{f'{len(layers.students)} layers' if layers.is_list else 'a tensor'}"
        )
    for i, (stored, x) in enumerate(zip(statistics, layers.students, strict=True)):
        name = f"teacher[{i}]" if several else "teacher"
        if not checks.is_statistics(stored):
            raise TypeError(f"{name} must be TeacherStatistics; got {type(stored).__name__}")
        if stored.mean.device != x.device:
            raise ValueError(
                f"{name} and student must be on the same device; got {stored.mean.device} and "
                f"{x.device}: move the statistics with .to(device)"
            )
        if rotation is None and stored.width != x.shape[-1]:
            raise ValueError(
                f"{name} must have the student's width, {x.shape[-1]}, without a rotation; got "
                f"{stored.width}"
            )
        if checks.is_readable(x) and float(stored.count) <= 1:
            raise ValueError(
                f"{name} must hold at least 2 rows; got {float(stored.count):g}: pass the "
                "teacher's features to its update()"
            )
    return statistics


def _degrees(count: Tensor, dtype: torch.dtype) -> Tensor:
    """The divisor n - 1 of a scatter, in the shape of a block; NaN for fewer than 2 rows."""
    return (count - 1).masked_fill(count < 2, float("nan")).to(dtype)[..., None, None]


def _student(moments: SecondMoments) -> Gaussian:
    scatter = moments.student
    return Gaussian(moments.student_mean, scatter / _degrees(moments.count, scatter.dtype))


def _teacher(moments: SecondMoments) -> Gaussian:
    scatter = moments.teacher
    return Gaussian(moments.teacher_mean, scatter / _degrees(moments.count, scatter.dtype))


def _stored(statistics: Statistics, dtype: torch.dtype) -> Gaussian:
    return Gaussian(statistics.mean.to(dtype), statistics.covariance().to(dtype))


class _Unbiased(NamedTuple):
    """Estimates for squared norms, which few rows make too large."""

    square: Tensor  # of ||Sigma||^2: HSIC_1 of the rows with themselves
    excess: Tensor  # of what sampling adds to ||mean||^2: tr(S) / n


Estimate = tuple[Gaussian, _Unbiased | None]


def _biased(layers: Layers, i: int, ranks: Ranks | None, precision: str, backend: str) -> Estimate:
    layer = layers._replace(
        students=layers.students[i : i + 1],
        teachers=layers.teachers[i : i + 1],
        masks=layers.mask(i),
    )
    (moments,) = second_moments.of_layers(layer, ranks, "xx", precision, backend)
    return _student(moments), None


def _debiased(
    layers: Layers, i: int, ranks: Ranks | None, precision: str, backend: str
) -> Estimate:
    x = layers.students[i]
    problem = Problem("moments", (False,), *x.shape[-2:])

    def compute(plan: Plan) -> tuple[Tensor, ...]:
        return autograd.self_hsic_moments(x, layers.mask(i), precision, plan, ranks)

    mean, count, scatter, square = plan.run(compute, backend, problem, layers, ranks)
    n = count.masked_fill(count < 4, float("nan"))
    covariance = scatter / _degrees(n, scatter.dtype)
    trace = covariance.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    return Gaussian(mean, covariance), _Unbiased(square / (n * (n - 3)), trace / n)


def _square(block: Tensor, axes: tuple[int, ...] = (-2, -1)) -> Tensor:
    return block.double().square().sum(axes)


def _unit(norm_square: Tensor, width: int, scale: str) -> Tensor:
    """The factor ``s`` of the distance; 0 if it is relative to a norm of 0."""
    if scale == "relative":
        is_zero = norm_square == 0
        inverse = norm_square.masked_fill(is_zero, 1.0).reciprocal()
        return inverse.masked_fill(is_zero, 0.0)
    return torch.full_like(norm_square, 1 / (4 * width**2) if scale == "coral" else 1.0)


def _distance(
    student: Gaussian,
    teacher: Gaussian,
    rotation: Tensor | None,
    scale: str,
    mean_weight: float,
    precision: str,
    unbiased: _Unbiased | None = None,
) -> Tensor:
    mean, covariance = teacher
    dtype = student.covariance.dtype
    with torch.autocast(covariance.device.type, enabled=False):
        if rotation is not None:
            q = rotation.to(dtype)
            right = rotate(covariance, covariance, q, precision)
            left = q.mT.expand(*covariance.shape[:-2], *q.mT.shape)
            covariance = rotate(covariance, left, right, precision)
            mean = rotate(mean, mean.unsqueeze(-2), q, precision).squeeze(-2)
        unit = _unit(_square(covariance), covariance.shape[-1], scale)
        means = _square(student.mean - mean, (-1,))
        if unbiased is None:
            value = _square(student.covariance - covariance)
        else:
            # Without ||S_s||^2: one long row can make it so large that rounding hides the rest.
            cross = (student.covariance.double() * covariance.double()).sum((-2, -1))
            value = unbiased.square - 2 * cross + _square(covariance)
            means = means - unbiased.excess
        value = value * unit
        if mean_weight:
            value = value + mean_weight * means
        return value.to(dtype)


def _distances_of_spectra(
    layers: Layers,
    ranks: Ranks | None,
    scale: str,
    precision: str,
    backend: str,
) -> list[Tensor]:
    statistics = layers.statistics
    sides = 1 if statistics else 2
    moments: list[SecondMoments] = []
    if ranks is not None:
        block_names = "xx" if statistics else "xx yy"
        moments = second_moments.of_layers(layers, ranks, block_names, precision, backend)
    values = []
    for i, pair in enumerate(layers.pairs):
        if moments:
            gaussians = (_student(moments[i]), _teacher(moments[i]))[:sides]
            spectra = [eigenvalues(gaussian.covariance.double()) for gaussian in gaussians]
        else:
            spectra = [_spectrum(features, layers.mask(i)) for features in pair[:sides]]
        if statistics:
            spectra.append(eigenvalues(statistics[i].covariance()))
        student, teacher = spectra
        unit = _unit(_square(teacher, (-1,)), teacher.shape[-1], scale)
        is_wide = torch.float64 in layers.dtypes
        value = _square(student - teacher, (-1,)) * unit
        values.append(value.to(torch.float64 if is_wide else torch.float32))
    return values


def _spectrum(rows: Tensor, masks: list[Tensor]) -> Tensor:
    """Eigenvalues (..., D) of the covariance, ascending, from whichever Gram matrix is smaller."""
    with torch.autocast(rows.device.type, enabled=False):
        centered, _, count = subtract_own_mean(rows, masks[0] if masks else None, torch.float64)
        missing = centered.shape[-1] - centered.shape[-2]
        matrix = centered.mT @ centered if missing <= 0 else centered @ centered.mT
        values = eigenvalues(matrix / _degrees(count, torch.float64))
        return pad(values, (missing, 0)) if missing > 0 else values
