"""From a public function's arguments to its values: checks, ranks, the plan, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import autograd, checks, covariance_matching, plan, second_moments, shared_batch
from .autograd import Call
from .availability import Problem
from .checks import Features, Layers, Mask
from .plan import Plan
from .ranks import Group
from .rotations import rotated_teachers
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
        if rotation is None:
            return layers
        return layers._replace(rotations=checks.rotations(rotation, layers))

    shared_settings = (name, *settings, rotation is not None, precision)
    layers, ranks = shared_batch.share(group, check, min_rows, shared_settings)
    if layers.rotations:
        if ranks is not None:
            # All ranks need the same gradient of Q, so Q is applied to the moments that they share.
            scale, mean_weight = settings
            return covariance_matching.at_rotations(
                layers, ranks, scale, mean_weight, precision, backend
            )
        layers = layers._replace(teachers=rotated_teachers(layers, precision))
    shapes = [(*x.shape[-2:], y.shape[-1]) for x, y in layers.pairs]
    # Ranks can share moments in covariance form only.
    gram = tuple([ranks is None and plan.use_gram(name, *shape) for shape in shapes])
    problem = Problem(
        measure=name if ranks is None else "moments",
        gram=gram,
        rows=max([rows for rows, _, _ in shapes]),
        width=max([max(d1, d2) for _, d1, d2 in shapes]),
        masked=len(layers.masks) > 0,
    )

    def compute(plan: Plan) -> Tensor:
        call = Call(name, settings, plan, precision, ranks)
        return autograd.measure(call, layers.students, layers.teachers, layers.masks)

    values = plan.run(compute, backend, problem, layers, ranks)
    return values.unsqueeze(0) if layers.is_list and len(shapes) == 1 else values


def moments(
    student: Features,
    teacher: Features,
    mask: Mask,
    min_rows: int,
    group: Group,
    shared_settings: tuple[Any, ...],
    block_names: str,
    precision: str,
    backend: str,
) -> list[SecondMoments]:
    """The second moments of each layer, with the blocks of these names."""
    checks.option("precision", precision, checks.PRECISIONS)

    def check() -> Layers:
        return checks.layers(student, teacher, mask, equal_widths=False)

    layers, ranks = shared_batch.share(group, check, min_rows, shared_settings)
    return second_moments.of_layers(layers, ranks, block_names, precision, backend)
