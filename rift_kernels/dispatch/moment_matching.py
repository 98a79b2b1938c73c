"""Covariance distances made of moments, by native autograd.

For what the kernels' way from two sets of features to a value does not serve: a teacher known by
its statistics alone, the best of all rotations, and a rotation of what many ranks share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rift_kernels.measures.centering import center
from rift_kernels.measures.matrix_functions import eigenvalues

from . import autograd, checks, plan, second_moments, shared_batch
from .checks import Features, Mask, Statistics
from .ranks import Group, Ranks

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

    def check() -> checks.Layers:
        if checks.is_features(teacher):
            return checks.layers(student, teacher, mask, equal_widths=True)
        given = checks.layers(student, _one_column(student), mask, equal_widths=False)
        _statistics(teacher, given, matrices)
        return given

    kinds = (optimal, matrices is not None, checks.is_features(teacher))
    debiased = debiased and not optimal and not checks.is_features(teacher)
    settings = ("matching", scale, mean_weight, *kinds, debiased, precision)
    given, ranks = shared_batch.share(group, check, 4 if debiased else 2, settings)
    stored = [] if checks.is_features(teacher) else _statistics(teacher, given, matrices)
    if optimal:
        values = _distances_of_spectra(given, ranks, stored, scale, precision, backend)
    else:
        turned = checks.rotations(matrices, given, [one.width for one in stored])
        values = []
        for i, one in enumerate(stored):
            student, unbiased = (_debiased if debiased else _biased)(
                given, i, ranks, precision, backend
            )
            teachers = _stored(one, student.covariance.dtype)
            q = turned[i] if turned else None
            how = (scale, mean_weight, precision)
            values.append(_distance(student, teachers, q, *how, unbiased))
    return torch.stack(values) if given.is_list else values[0]


def of_moments(
    given: checks.Layers,
    ranks: Ranks,
    rotations: list[Tensor],
    scale: str,
    mean_weight: float,
    precision: str,
    backend: str,
) -> Tensor:
    """The distance at these rotations, of moments that ranks sum."""
    found = second_moments.of_layers(given, ranks, "xx yy", precision, backend)
    values = [
        _distance(_students(own), _teachers(own), q, scale, mean_weight, precision)
        for own, q in zip(found, rotations, strict=True)
    ]
    return torch.stack(values) if given.is_list else values[0]


def _only_spectra(rotation: object, mean_weight: float, backend: str) -> None:
    checks.option("rotation", rotation, ("optimal",))
    if mean_weight:
        raise ValueError(
            "mean_weight must be 0 for rotation='optimal', which is the best rotation of the "
            f"covariance alone; got {mean_weight!r}"
        )
    if backend not in ("auto", "eager"):
        raise RuntimeError(
            f"backend={backend!r} cannot run: rotation='optimal' is an eigendecomposition, which "
            "only the eager backend has"
        )


def _one_column(student: Features) -> Features:
    """Something with the student's rows in the teacher's place; whatever is no tensor as it is."""
    sides = [student] if isinstance(student, Tensor) else student
    if not isinstance(sides, list | tuple) or not all(isinstance(x, Tensor) for x in sides):
        return student
    columns = [x.detach()[..., :1] for x in sides]
    return columns[0] if isinstance(student, Tensor) else columns


def _statistics(teacher: Any, given: checks.Layers, rotation: Features | None) -> list[Statistics]:
    """One a layer, of the student's width and on its device."""
    several = isinstance(teacher, list | tuple)
    stored: list[Statistics] = list(teacher) if several else [teacher]
    if several != given.is_list or len(stored) != len(given.students):
        raise ValueError(
            "teacher must be TeacherStatistics for a tensor, and for a list one a layer; got "
            f"{len(stored) if several else 'one'} for "
            f"{f'{len(given.students)} layers' if given.is_list else 'a tensor'}"
        )
    for i, (one, x) in enumerate(zip(stored, given.students, strict=True)):
        name = f"teacher[{i}]" if several else "teacher"
        if not checks.is_statistics(one):
            raise TypeError(f"{name} must be TeacherStatistics; got {type(one).__name__}")
        if one.mean.device != x.device:
            raise ValueError(
                f"{name} and student must be on the same device; got {one.mean.device} and "
                f"{x.device}: move it with .to(device)"
            )
        if rotation is None and one.width != x.shape[-1]:
            raise ValueError(
                f"{name} must have the student's width, {x.shape[-1]}, without a rotation; got "
                f"{one.width}"
            )
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and float(one.count) <= 1:
            raise ValueError(
                f"{name} must be of at least 2 rows; got {float(one.count):g}: give it the "
                "teacher's features with update()"
            )
    checks.rotations(rotation, given, [one.width for one in stored])
    return stored


def _degrees(count: Tensor, dtype: torch.dtype) -> Tensor:
    """What a sum of squares is divided by, NaN of too few rows; to divide a block."""
    return (count - 1).masked_fill(count < 2, float("nan")).to(dtype)[..., None, None]


def _students(own: second_moments.SecondMoments) -> Gaussian:
    return Gaussian(own.student_mean, own.student / _degrees(own.count, own.student.dtype))


def _teachers(own: second_moments.SecondMoments) -> Gaussian:
    return Gaussian(own.teacher_mean, own.teacher / _degrees(own.count, own.teacher.dtype))


def _stored(one: Statistics, dtype: torch.dtype) -> Gaussian:
    return Gaussian(one.mean.to(dtype), one.covariance().to(dtype))


class _Unbiased(NamedTuple):
    """What is unbiased of a few rows, while their covariance's norm and their mean's are not."""

    square: Tensor  # of ||Sigma||^2: HSIC_1 of the rows with themselves
    excess: Tensor  # by how much ||mean||^2 is larger than that of the data: tr(S) / n


Student = tuple[Gaussian, _Unbiased | None]


def _biased(given: checks.Layers, i: int, ranks: Ranks | None, *how: str) -> Student:
    layer = given._replace(
        students=given.students[i : i + 1], teachers=given.teachers[i : i + 1], masks=given.mask(i)
    )
    (own,) = second_moments.of_layers(layer, ranks, "xx", *how)
    return _students(own), None


def _debiased(given: checks.Layers, i: int, ranks: Ranks | None, *how: str) -> Student:
    precision, backend = how
    x = given.students[i]
    problem = plan.Problem("moments", (), *x.shape[-2:])

    def by(chosen: str) -> tuple[Tensor, ...]:
        return autograd.own_moments(x, given.mask(i), ranks, precision, chosen)

    alone = ranks is None
    found = plan.run(by, backend, x.device, given.dtypes, problem, repeatable=alone)
    mean, count, block, square = found
    n = count.masked_fill(count < 4, float("nan"))
    covariance = block / _degrees(n, block.dtype)
    trace = covariance.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    return Gaussian(mean, covariance), _Unbiased(square / (n * (n - 3)), trace / n)


def _square(block: Tensor, axes: tuple[int, ...] = (-2, -1)) -> Tensor:
    return block.double().square().sum(axes)


def _unit(norm_square: Tensor, width: int, scale: str) -> Tensor:
    """``s``: 0 where a relative distance is one to nothing."""
    if scale == "relative":
        nothing = norm_square == 0
        inverse = norm_square.masked_fill(nothing, 1.0).reciprocal()
        return inverse.masked_fill(nothing, 0.0)
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
            right = autograd.rotate(covariance, covariance, q, precision)
            left = q.mT.expand(*covariance.shape[:-2], *q.mT.shape)
            covariance = autograd.rotate(covariance, left, right, precision)
            mean = autograd.rotate(mean, mean.unsqueeze(-2), q, precision).squeeze(-2)
        unit = _unit(_square(covariance), covariance.shape[-1], scale)
        means = _square(student.mean - mean, (-1,))
        if unbiased is None:
            value = _square(student.covariance - covariance)
        else:
            # Without ||S_s||^2, which one long row can make so large that nothing else is left.
            cross = (student.covariance.double() * covariance.double()).sum((-2, -1))
            value = unbiased.square - 2 * cross + _square(covariance)
            means = means - unbiased.excess
        value = value * unit
        if mean_weight:
            value = value + mean_weight * means
        return value.to(dtype)


def _distances_of_spectra(
    given: checks.Layers,
    ranks: Ranks | None,
    stored: list[Statistics],
    scale: str,
    precision: str,
    backend: str,
) -> list[Tensor]:
    sides = 1 if stored else 2
    found: list[second_moments.SecondMoments] = []
    if ranks is not None:
        found = second_moments.of_layers(given, ranks, "xx yy"[: 3 * sides - 1], precision, backend)
    values = []
    for i, pair in enumerate(given.pairs):
        if found:
            both = (_students(found[i]), _teachers(found[i]))[:sides]
            spectra = [eigenvalues(side.covariance.double()) for side in both]
        else:
            spectra = [_spectrum(side, given.mask(i)) for side in pair[:sides]]
        if stored:
            spectra.append(eigenvalues(stored[i].covariance()))
        own, other = spectra
        unit = _unit(_square(other, (-1,)), other.shape[-1], scale)
        wide = torch.float64 in given.dtypes
        value = _square(own - other, (-1,)) * unit
        values.append(value.to(torch.float64 if wide else torch.float32))
    return values


def _spectrum(rows: Tensor, masks: list[Tensor]) -> Tensor:
    """Eigenvalues (..., D) of the covariance, ascending, from whichever Gram matrix is smaller."""
    with torch.autocast(rows.device.type, enabled=False):
        centered, _, count = center(rows, masks[0] if masks else None, torch.float64)
        missing = centered.shape[-1] - centered.shape[-2]
        matrix = centered.mT @ centered if missing <= 0 else centered @ centered.mT
        values = eigenvalues(matrix / _degrees(count, torch.float64))
        return pad(values, (missing, 0)) if missing > 0 else values
