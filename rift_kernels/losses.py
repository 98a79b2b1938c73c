"""The loss module: its settings and its call into :mod:`rift_kernels.functional`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from . import functional
from .dispatch import availability, checks
from .dispatch.checks import Features, Mask
from .dispatch.covariance_matching import Teacher
from .dispatch.ranks import Group
from .weighting import AdaptiveWeight

MEASURES = ("cka", "procrustes", "covariance", "bures")
REDUCTIONS = ("mean", "sum", "none")
ROTATIONS = ("identity", "learned", "optimal")


class RIFTLoss(nn.Module):
    """Keep a student's features similar to a frozen teacher's during finetuning.

    ``weight * reduce(1 - similarity)`` for ``"cka"`` and ``"procrustes"``,
    ``weight * reduce(distance)`` for ``"covariance"`` and ``"bures"``. Add it to the task loss::

        loss = task_loss + rift(student_features, teacher_features)

    Args:
        measure: ``"cka"`` (:func:`~rift_kernels.linear_cka`), ``"procrustes"``
            (:func:`~rift_kernels.procrustes_similarity`), ``"covariance"``
            (:func:`~rift_kernels.covariance_distance`) or ``"bures"``
            (:func:`~rift_kernels.bures_distance`, squared).
        debiased: for ``"cka"``, and for ``"covariance"`` with statistics as teacher.
        weight: factor of the loss: a number, or an :class:`~rift_kernels.AdaptiveWeight`, which
            adjusts itself. An adaptive weight needs ``"cka"``, ``"procrustes"`` or the relative
            ``"covariance"``, whose similarity is taken to be 1 - distance.
        margin: replaces the distance of each layer by ``relu(distance - margin)``, for a similarity
            ``relu(1 - margin - similarity)``. Layers within the margin get no gradient.
        reduction: over layers and batches: ``"mean"``, ``"sum"`` or ``"none"``.
        rotation: the orthogonal matrix Q of ``"covariance"``.

            - ``"identity"`` preserves the covariance itself, so directions keep their meaning.
            - ``"learned"`` makes Q a parameter of this module that starts at the identity; give it
              to the optimiser. It preserves the covariance up to one rotation of the whole space,
              which the following head can undo. Q serves one pair of widths, so it takes no lists
              of layers. It stays in float32 when the surrounding model is cast to half precision.
              torch cannot pickle such a module: save its ``state_dict()``.
            - ``"optimal"`` computes the best Q of every step in closed form, without parameters. It
              preserves the eigenvalues alone: no direction is tied to its former meaning.

            None of them preserves where each sample lies; ``"cka"`` and ``"procrustes"`` compare
            that.
        student_width, teacher_width: D1 and D2, required for a learned rotation.
        scale, mean_weight: for ``"covariance"`` (both) and ``"bures"`` (``mean_weight``).
        precision, backend, group: see :mod:`rift_kernels.functional`. Copies of the module share
            its group. Process groups cannot be pickled; ``"world"`` can.

    Shape:
        student (..., N, D1), teacher (..., N, D2), mask (..., N) boolean or None; or lists. For
        ``"covariance"`` the teacher may be :class:`~rift_kernels.TeacherStatistics` (or a list).
        Returns a scalar, or with ``reduction="none"`` one value for each layer.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at the call; also for a
            setting that the measure does not use.
    """

    def __init__(
        self,
        measure: str = "cka",
        *,
        debiased: bool = True,
        weight: float | AdaptiveWeight = 1.0,
        margin: float = 0.0,
        reduction: str = "mean",
        rotation: str = "identity",
        student_width: int | None = None,
        teacher_width: int | None = None,
        scale: str = "relative",
        mean_weight: float = 0.0,
        precision: str = "highest",
        backend: str = "auto",
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.option("measure", measure, MEASURES)
        checks.option("reduction", reduction, REDUCTIONS)
        checks.option("rotation", rotation, ROTATIONS)
        checks.option("scale", scale, checks.SCALES)
        checks.option("precision", precision, checks.PRECISIONS)
        checks.option("backend", backend, ("auto", *availability.BACKENDS))
        checks.flag("debiased", debiased)
        self.measure = measure
        self.debiased = debiased
        self.weight = _weight(weight, measure, scale)
        self.margin = checks.number("margin", margin)
        self.group = group
        self.reduction = reduction
        self.scale = scale
        self.mean_weight = checks.number("mean_weight", mean_weight)
        self.precision = precision
        self.backend = backend
        for name, default, users in (
            ("debiased", True, ("cka", "covariance")),
            ("scale", "relative", ("covariance",)),
            ("mean_weight", 0.0, ("covariance", "bures")),
        ):
            value = getattr(self, name)
            if value != default and measure not in users:
                raise ValueError(
                    f"{name} must be {default!r} for measure={measure!r}, which does not use it; "
                    f"got {value!r}"
                )
        self.optimal = rotation == "optimal"
        if self.optimal and (measure != "covariance" or self.mean_weight):
            raise ValueError(
                "rotation='optimal' needs measure='covariance' and mean_weight=0; got "
                f"measure={measure!r} and mean_weight={mean_weight!r}"
            )
        self.rotation: nn.Linear | None = None
        if rotation == "learned":
            self.rotation = _rotation(measure, student_width, teacher_width)
        elif student_width is not None or teacher_width is not None:
            raise ValueError(
                "student_width and teacher_width must be None without rotation='learned'; "
                f"got {student_width!r} and {teacher_width!r}"
            )

    def forward(self, student: Features, teacher: Teacher, mask: Mask = None) -> Tensor:
        """The loss of these features; see the class."""
        return self.from_distances(self.distances(student, teacher, mask))

    def distances(self, student: Features, teacher: Teacher, mask: Mask = None) -> Tensor:
        """The unweighted distance of each layer; ``1 - similarity`` for a similarity."""
        if self.rotation is not None and not isinstance(student, Tensor):
            raise TypeError(
                "student must be a tensor for rotation='learned', which serves one pair of widths; "
                f"got {type(student).__name__}: use a loss for each layer"
            )
        if self.measure != "covariance" and not checks.is_features(teacher):
            raise TypeError(
                f"teacher must be features for measure={self.measure!r}; got statistics, which "
                "only measure='covariance' takes"
            )
        settings: dict[str, Any] = {
            "mask": mask,
            "precision": self.precision,
            "backend": self.backend,
            "group": self.group,
        }
        if self.measure == "cka":
            settings |= {"debiased": self.debiased, "distance": True}
            return functional.linear_cka(student, teacher, **settings)  # type: ignore[arg-type]
        if self.measure == "procrustes":
            settings["distance"] = True
            return functional.procrustes_similarity(student, teacher, **settings)  # type: ignore[arg-type]
        settings["mean_weight"] = self.mean_weight
        if self.measure == "bures":
            return functional.bures_distance(student, teacher, **settings)  # type: ignore[arg-type]
        assert self.measure == "covariance"
        settings |= {
            "debiased": self.debiased,
            "scale": self.scale,
            "rotation": "optimal" if self.optimal else self._matrix(),
        }
        return functional.covariance_distance(student, teacher, **settings)

    def from_distances(self, distances: Tensor) -> Tensor:
        """Apply margin, weight and reduction to distances; an adaptive weight takes its step."""
        weight = self.weight
        if isinstance(weight, AdaptiveWeight):
            weight = weight(distances)
        values = distances
        if self.margin:
            values = (values - self.margin).relu()
        # Every operation costs a launch forward and one backward, so no-ops are skipped.
        if values.dim() and self.reduction == "mean":
            values = values.mean()
        elif values.dim() and self.reduction == "sum":
            values = values.sum()
        return values if isinstance(weight, float) and weight == 1 else weight * values

    def _matrix(self) -> Tensor | None:
        """The learned Q, computed without autocast, which would destroy its orthogonality."""
        if self.rotation is None:
            return None
        with torch.autocast(next(self.rotation.parameters()).device.type, enabled=False):
            return self.rotation.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module, except that a rotation is never cast to half precision."""

        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            is_half = result.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(result.device) if is_half else result

        return super()._apply(move, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy everything except the group, which cannot be copied and is shared."""
        memo[id(self.group)] = self.group
        memo[id(self)] = module = type(self).__new__(type(self))
        module.__setstate__(copy.deepcopy(self.__dict__, memo))
        return module

    def extra_repr(self) -> str:
        """The settings that affect the measure."""
        weight = self.weight if isinstance(self.weight, float) else "adaptive"
        settings = f"{self.measure!r}, weight={weight}, reduction={self.reduction!r}"
        if self.margin:
            settings += f", margin={self.margin}"
        return settings + (f", debiased={self.debiased}" if self.measure == "cka" else "")


def _weight(weight: object, measure: str, scale: str) -> float | AdaptiveWeight:
    if not isinstance(weight, AdaptiveWeight):
        return checks.number("weight", weight)
    if measure == "bures" or (measure == "covariance" and scale != "relative"):
        raise ValueError(
            f"weight must be a number for a distance that has a unit, as measure={measure!r} has; "
            "got an AdaptiveWeight, which needs 'cka', 'procrustes' or the relative 'covariance'"
        )
    return weight


def _rotation(measure: str, student_width: int | None, teacher_width: int | None) -> nn.Linear:
    """A layer whose weight is Q (D2, D1), initially the identity and kept orthogonal by torch."""
    if measure != "covariance":
        raise ValueError(
            f"rotation='learned' needs measure='covariance'; measure={measure!r} "
            "has no rotation to learn"
        )
    widths = _width("student_width", student_width), _width("teacher_width", teacher_width)
    layer = nn.Linear(*widths, bias=False, dtype=torch.float32)  # whatever the default dtype
    with torch.no_grad():
        nn.init.eye_(layer.weight)
    parametrizations.orthogonal(layer, "weight")
    return layer


def _width(name: str, width: int | None) -> int:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"{name} must be a positive integer for rotation='learned'; got {width!r}")
    return width
