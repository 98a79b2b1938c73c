"""The loss module: settings, and a call into :mod:`rift_kernels.functional`. No mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from . import checks, dispatch, functional
from .checks import Features, Mask

MEASURES = ("cka", "procrustes", "covariance", "bures")
REDUCTIONS = ("mean", "sum", "none")
ROTATIONS = ("identity", "learned")


class RIFTLoss(nn.Module):
    """Keep a student's features similar to a frozen teacher's while it is finetuned.

    ``weight * reduce(1 - similarity)`` for ``"cka"`` and ``"procrustes"``,
    ``weight * reduce(distance)`` for ``"covariance"`` and ``"bures"``. Add it to the task loss::

        loss = task_loss + rift(student_features, teacher_features)

    Args:
        measure: ``"cka"`` (:func:`~rift_kernels.linear_cka`), ``"procrustes"``
            (:func:`~rift_kernels.procrustes_similarity`), ``"covariance"``
            (:func:`~rift_kernels.covariance_distance`) or ``"bures"``
            (:func:`~rift_kernels.bures_distance`, squared).
        debiased: for ``"cka"``.
        weight: multiplies the loss.
        reduction: over layers and batches: ``"mean"``, ``"sum"`` or ``"none"``.
        rotation: for ``"covariance"``: ``"identity"``, or ``"learned"`` for a matrix Q with
            orthonormal columns that is a parameter of this module and starts at the identity: give
            it to the optimiser. Q serves one pair of widths, so no lists of layers. It stays in
            float32 when the model around it is cast to half precision. torch cannot pickle such a
            module: save its ``state_dict()``.
        student_width, teacher_width: D1 and D2, needed for a learned rotation.
        scale, mean_weight: for ``"covariance"`` (both) and ``"bures"`` (``mean_weight``).
        precision, backend: see :mod:`rift_kernels.functional`.

    Shape:
        student (..., N, D1), teacher (..., N, D2), mask (..., N) boolean or None; or lists.
        Returns a scalar, or one value a layer for ``reduction="none"``.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at the call; also for a
            setting that the measure does not have.
    """

    def __init__(
        self,
        measure: str = "cka",
        *,
        debiased: bool = True,
        weight: float = 1.0,
        reduction: str = "mean",
        rotation: str = "identity",
        student_width: int | None = None,
        teacher_width: int | None = None,
        scale: str = "relative",
        mean_weight: float = 0.0,
        precision: str = "high",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.option("measure", measure, MEASURES)
        checks.option("reduction", reduction, REDUCTIONS)
        checks.option("rotation", rotation, ROTATIONS)
        checks.option("scale", scale, functional.SCALES)
        checks.option("precision", precision, functional.PRECISIONS)
        checks.option("backend", backend, ("auto", *dispatch.BACKENDS))
        checks.flag("debiased", debiased)
        self.measure = measure
        self.debiased = debiased
        self.weight = checks.number("weight", weight)
        self.reduction = reduction
        self.scale = scale
        self.mean_weight = checks.number("mean_weight", mean_weight)
        self.precision = precision
        self.backend = backend
        for name, default, users in (
            ("debiased", True, ("cka",)),
            ("scale", "relative", ("covariance",)),
            ("mean_weight", 0.0, ("covariance", "bures")),
        ):
            given = getattr(self, name)
            if given != default and measure not in users:
                raise ValueError(
                    f"{name} must be {default!r} for measure={measure!r}, which does not use it; "
                    f"got {given!r}"
                )
        self.rotation: nn.Linear | None = None
        if rotation == "learned":
            self.rotation = _rotation(measure, student_width, teacher_width)
        elif student_width is not None or teacher_width is not None:
            raise ValueError(
                "student_width and teacher_width must be None without rotation='learned'; "
                f"got {student_width!r} and {teacher_width!r}"
            )

    def forward(self, student: Features, teacher: Features, mask: Mask = None) -> Tensor:
        """The loss of these features; see the class."""
        if self.rotation is not None and not isinstance(student, Tensor):
            raise TypeError(
                "student must be a tensor for rotation='learned', which serves one pair of widths; "
                f"got {type(student).__name__}: use a loss for each layer"
            )
        how: dict[str, Any] = {"mask": mask, "precision": self.precision, "backend": self.backend}
        if self.measure == "cka":
            how |= {"debiased": self.debiased, "distance": True}
            values = functional.linear_cka(student, teacher, **how)
        elif self.measure == "procrustes":
            values = functional.procrustes_similarity(student, teacher, distance=True, **how)
        elif self.measure == "covariance":
            how |= {"scale": self.scale, "mean_weight": self.mean_weight}
            values = functional.covariance_distance(
                student, teacher, rotation=self._matrix(), **how
            )
        else:
            values = functional.bures_distance(
                student, teacher, mean_weight=self.mean_weight, **how
            )
        # Each operation is a launch forward and one backward: none that does nothing.
        if values.dim() and self.reduction == "mean":
            values = values.mean()
        elif values.dim() and self.reduction == "sum":
            values = values.sum()
        return values if self.weight == 1 else self.weight * values

    def _matrix(self) -> Tensor | None:
        """The learned Q, formed without autocast, under which it would not be orthogonal."""
        if self.rotation is None:
            return None
        with torch.autocast(next(self.rotation.parameters()).device.type, enabled=False):
            return self.rotation.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever moves or casts a module, but a rotation is never cast to half precision."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            half = result.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(result.device) if half else result

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """The settings that matter for the measure."""
        settings = f"{self.measure!r}, weight={self.weight}, reduction={self.reduction!r}"
        return settings + (f", debiased={self.debiased}" if self.measure == "cka" else "")


def _rotation(measure: str, student_width: int | None, teacher_width: int | None) -> nn.Linear:
    """A layer whose weight is Q (D2, D1), kept orthogonal by torch and starting at the identity."""
    if measure != "covariance":
        raise ValueError(
            f"rotation='learned' needs measure='covariance'; measure={measure!r} "
            "has no rotation to learn"
        )
    layer = nn.Linear(
        _width("student_width", student_width), _width("teacher_width", teacher_width), bias=False
    )
    with torch.no_grad():
        nn.init.eye_(layer.weight)
    parametrizations.orthogonal(layer, "weight")
    return layer


def _width(name: str, width: int | None) -> int:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"{name} must be a positive integer for rotation='learned'; got {width!r}")
    return width
