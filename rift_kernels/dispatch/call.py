"""From a public function's arguments to its values: checks, ranks, the plan, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import autograd, checks, moment_matching, plan, second_moments, shared_batch
from .autograd import Call
from .availability import Problem
from .checks import Features, Layers, Mask
from .plan import Plan
from .ranks import Group
from .second_moments import SecondMoments


def measure(
    name: str,
    settings: tuple[Any, ...],
    student: Features,
    teacher: Features,
    mask: Mask,
    precision: str,
    backend: str,
    group: Group,
    *,
    min_rows: int = 2,
    equal_widths: bool = False,
    rotation: Features | None = None,
) -> Tensor:
    """The values of a measure of two sets of features.

    Args:
        name: ``"cka"``, ``"procrustes"``, ``"covariance"`` or ``"bures"``.
        settings: of the measure, in the order of its operator.
        rotation: applied to the teacher first.
    """
    checks.option("precision", precision, checks.PRECISIONS)

    def check() -> Layers:
        layers = checks.layers(student, teacher, mask, equal_widths=equal_widths)
        checks.rotations(rotation, layers)
        return layers

    agreed = (name, *settings, rotation is not None, precision)
    layers, ranks = shared_batch.share(group, check, min_rows, agreed)
    rotations = checks.rotations(rotation, layers)
    if ranks is not None and rotations:
        # Q's gradient has to be the same on all ranks, so Q is applied to what they share.
        scale, mean_weight = settings
        return moment_matching.at_rotations(
            layers, ranks, rotations, scale, mean_weight, precision, backend
        )
    teachers = layers.teachers
    # A rotation makes the teacher as wide as the student.
    rotated = layers.students if rotations else teachers
    shapes = [(*x.shape[-2:], y.shape[-1]) for x, y in zip(layers.students, rotated, strict=True)]
    # Moments that ranks share are those of the covariance form.
    gram = tuple(ranks is None and plan.use_gram(name, *shape) for shape in shapes)
    rows, width = max(n for n, _, _ in shapes), max(max(d1, d2) for _, d1, d2 in shapes)
    kind = name if ranks is None else "moments"
    problem = Problem(kind, gram, rows, width, len(layers.masks) > 0)
    if rotations:
        teachers = _rotate(layers, rotations, precision)

    def compute(plan: Plan) -> Tensor:
        call = Call(name, settings, plan, precision, ranks)
        return autograd.measure(call, layers.students, teachers, layers.masks)

    device, is_alone = teachers[0].device, ranks is None
    # A rank among others cannot repeat by itself what all do together.
    values = plan.run(compute, problem, backend, device, layers.dtypes, repeatable=is_alone)
    return values.unsqueeze(0) if layers.is_list and len(teachers) == 1 else values


def _rotate(layers: Layers, rotations: list[Tensor], precision: str) -> list[Tensor]:
    teachers = []
    for i, ((x, y), q) in enumerate(zip(layers.pairs, rotations, strict=True)):
        for mask in layers.mask(i):
            # The rotation's gradient sums over rows, and 0 * NaN is not 0.
            y = y.masked_fill(~mask.unsqueeze(-1), 0.0)
        teachers.append(autograd.rotate(x, y, q, precision))
    return teachers


def moments(
    student: Features,
    teacher: Features,
    mask: Mask,
    min_rows: int,
    group: Group,
    agreed: tuple[Any, ...],
    wanted: str,
    precision: str,
    backend: str,
) -> list[SecondMoments]:
    """The wanted second moments of each layer."""
    checks.option("precision", precision, checks.PRECISIONS)

    def check() -> Layers:
        return checks.layers(student, teacher, mask, equal_widths=False)

    layers, ranks = shared_batch.share(group, check, min_rows, agreed)
    return second_moments.of_layers(layers, ranks, wanted, precision, backend)
