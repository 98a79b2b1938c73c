"""Second moments of checked layers, computed one layer after another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import autograd, plan
from .availability import Problem
from .checks import Layers
from .plan import Plan
from .ranks import Ranks


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


def of_layers(
    layers: Layers, ranks: Ranks | None, block_names: str, precision: str, backend: str
) -> list[SecondMoments]:
    """The moments of checked layers; blocks that are not in ``block_names`` are empty."""
    problem = Problem("moments", (False,), *layers.students[0].shape[-2:])

    def compute(plan: Plan) -> list[SecondMoments]:
        results = []
        for i, (x, y) in enumerate(layers.pairs):
            masks = layers.mask(i)
            mean_x, mean_y, count, *blocks = autograd.moments(
                x, y, masks, block_names, precision, plan, ranks
            )
            results.append(SecondMoments(count, mean_x, mean_y, *blocks))
        return results

    return plan.run(compute, backend, problem, layers, ranks)
