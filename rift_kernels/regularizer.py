"""RIFT for a training loop: catches the student's features, runs the teacher, returns the loss."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from .features.capture import FeatureCapture
from .features.forward_pass import (
    evaluating,
    token_mask,
    unwrapped,
    without_adapters,
    without_labels,
)
from .features.statistics import TeacherStatistics
from .losses import RIFTLoss
from .weighting import AdaptiveWeight

Layers = str | Sequence[str] | Mapping[str, str]
TeacherLike = nn.Module | Mapping[str, TeacherStatistics] | None


class RIFTRegularizer(nn.Module):
    """A :class:`~rift_kernels.RIFTLoss` between layers of a student and of its frozen teacher.

    ::

        rift = rk.RIFTRegularizer(model, teacher, layers="encoder.layer.11", pooling="cls")
        for batch in loader:
            loss = model(**batch).loss + rift(**batch)
            loss.backward()

    The student's features are caught while *you* run it. ``rift(...)`` takes what the model was
    called with, runs the teacher on it, in eval mode and without gradients, and compares: no second
    pass of the student. Call it once after each of the student's passes that gradients flow
    through, with the batch of that pass, within the same ``torch.autocast`` if there is one. The
    batch itself is not checked: another one of the same size is compared, wrongly. Without
    gradients on the way to the layers (frozen, below all adapters, or run under ``no_grad``) the
    loss has none either, of which it warns once.

    The teacher is one of

    - a frozen copy: ``copy.deepcopy(model)`` before the finetuning, or the pretrained model;
    - None, where the student has adapters (a PEFT model such as one with LoRA, or a transformers
      model with ``add_adapter``): the teacher is then the student with its adapters disabled, and
      there is no second copy of the weights. Only adapters may be trained in the layers compared;
    - :class:`~rift_kernels.TeacherStatistics` by layer, from
      :func:`~rift_kernels.collect_teacher_statistics`, for ``measure="covariance"``: no teacher
      runs at all. Collect them with the same ``pooling``, and have many rows a batch, for the
      covariance of few is noisy.

    Args:
        student: the model to be trained, wrapped already where it is to be (DDP, FSDP, PEFT), and
            not yet called where it is compiled.
        teacher: see above. It is neither trained nor part of this module's state; it has to be on
            the student's device (:meth:`move_teacher`).
        layers: names or patterns, as :class:`~rift_kernels.FeatureCapture` takes them; a mapping
            from the student's layers to the teacher's where they are called differently.
        pooling: see :class:`~rift_kernels.FeatureCapture`.
        measure, weight: see :class:`~rift_kernels.RIFTLoss`, as all further settings (``margin``,
            ``group``, ``rotation``, ...). With a learned rotation, give
            ``regularizer.parameters()`` to the optimiser.
        schedule: a factor of the weight for each call that computes gradients, the first being 0:
            ``schedule=lambda step: min(1.0, step / 100)`` warms up. Its step is part of
            ``state_dict``, as is an adaptive weight: save that in a checkpoint.

    Attributes:
        layers: the names of the student's layers that are compared.
        distances: of each layer, at the last call; no gradient. Where the measure is a similarity
            (``"cka"``, ``"procrustes"``), 1 less it. :meth:`metrics` has them for a logger.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at the call.
        RuntimeError: at a call before which the student was not run.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherLike = None,
        *,
        layers: Layers,
        measure: str = "cka",
        weight: float | AdaptiveWeight = 1.0,
        schedule: Callable[[int], float] | None = None,
        pooling: str = "cls",
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module; got {type(student).__name__}")
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule must be callable or None; got {type(schedule).__name__}")
        if settings.get("reduction") == "none":
            raise ValueError("reduction must be 'mean' or 'sum' for a loss to add; got 'none'")
        self.loss = RIFTLoss(measure, weight=weight, **settings)
        self.schedule = schedule
        self.step = 0
        self.distances: dict[str, Tensor] = {}
        self._warned = False
        # In a tuple: neither is a part of this module.
        self._models = (student, teacher)
        named = list(layers) if isinstance(layers, Mapping) else layers
        self._student = FeatureCapture(student, named, pooling)
        self._names = self._pair(layers)
        self._teacher = self._student
        if isinstance(teacher, nn.Module):
            _check_another(teacher, student)
            self._teacher = FeatureCapture(teacher, list(self._names.values()), pooling)
        elif teacher is None:
            without_adapters(student)
        else:
            self._check_statistics(teacher)

    def _pair(self, layers: Layers) -> dict[str, str]:
        """The teacher's name of each of the student's layers."""
        if not isinstance(layers, Mapping):
            return {name: name for name in self.layers}
        unknown = [name for name in layers if name not in self.layers]
        if unknown or self._models[1] is None:
            raise ValueError(
                "layers must map the student's own names, no patterns, to those of another model; "
                f"got {unknown or 'no other model'}"
            )
        return {name: layers[name] for name in self.layers}

    @property
    def layers(self) -> list[str]:
        """The names of the student's layers that are compared."""
        return self._student.layers

    def forward(self, *inputs: Any, mask: Tensor | None = None, **named: Any) -> Tensor:
        """The weighted loss of the features of the student's last pass.

        Args:
            inputs, named: what the student was called with; ``labels`` are not passed on. Unused
                where the teacher is statistics.
            mask: (batch, tokens) boolean, True = valid, for the poolings ``"mean"`` and
                ``"tokens"``; where None, the model's ``attention_mask`` serves (0 = padding).

        Returns:
            A scalar to add to the task's loss.
        """
        if mask is None and self._student.pooling != "cls":
            mask = token_mask(named, self._models[0], inputs)
        students = list(self._student.features(mask).values())
        teachers = self._teachers(inputs, named, mask)
        rows = self._student.mask(mask)
        students = _of_one_dtype(students)
        values = self._distances(students, teachers, rows)
        self.distances = dict(zip(self.layers, values.detach().reshape(-1).unbind(), strict=True))
        # What was compared is not compared again by mistake, and its graph is not kept.
        self._student.clear()
        loss = self.loss.from_distances(values)
        if self.schedule is not None:
            loss = self.schedule(self.step) * loss
        if self.training and torch.is_grad_enabled():
            self.step += 1
            self._warn_of_no_gradient(values)
        return loss

    def _warn_of_no_gradient(self, values: Tensor) -> None:
        if values.requires_grad or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"the loss has no gradient: nothing that leads to {', '.join(map(repr, self.layers))} "
            "is trained, or the student ran under no_grad",
            stacklevel=3,
        )

    def _distances(self, students: list[Tensor], teachers: Any, rows: Tensor | None) -> Tensor:
        one = len(students) == 1  # the one case that a learned rotation serves
        try:
            if one:
                return self.loss.distances(students[0], teachers[0], rows)
            return self.loss.distances(students, teachers, rows)
        except ValueError as error:  # raised there, so that all processes of a group know of it
            if isinstance(teachers[0], Tensor) and len(students[0]) != len(teachers[0]):
                error.add_note("Was the student's last pass with another batch than this call?")
            raise

    def _teachers(self, inputs: tuple[Any, ...], named: dict[str, Any], mask: Tensor | None) -> Any:
        """A teacher's features, or its statistics, of each layer."""
        student, teacher = self._models
        names = self._names.values()
        if isinstance(teacher, Mapping):
            return [teacher[name] for name in names]
        model = unwrapped(student if teacher is None else teacher)
        adapters = without_adapters(student) if teacher is None else nullcontext()
        with torch.no_grad(), evaluating(model), adapters, self._teacher.fresh() as capture:
            model(*inputs, **without_labels(named))
            features = capture.features(mask)
        return _of_one_dtype([features[name] for name in names])

    def metrics(self) -> dict[str, float]:
        """``rift/similarity/<layer>`` (or ``rift/distance/<layer>``) and ``rift/weight``, to log.

        Of the last call; the weight is without the schedule's factor. Reading them makes the host
        wait for a GPU.
        """
        similar = self.loss.measure in ("cka", "procrustes")
        kind = "similarity" if similar else "distance"
        found = {
            f"rift/{kind}/{name}": 1 - float(value) if similar else float(value)
            for name, value in self.distances.items()
        }
        weight = self.loss.weight
        found["rift/weight"] = float(weight.value if isinstance(weight, AdaptiveWeight) else weight)
        return found

    def remove(self) -> None:
        """Take the hooks away."""
        self._student.remove()
        self._teacher.remove()

    def move_teacher(self, device: torch.device | str) -> None:
        """Move the teacher, which is no part of this module, to a device; its statistics, too."""
        _, teacher = self._models
        if teacher is not None:
            for one in teacher.values() if isinstance(teacher, Mapping) else (teacher,):
                one.to(device)

    def get_extra_state(self) -> int:
        """The step of the schedule, for ``state_dict``."""
        return self.step

    def set_extra_state(self, state: int) -> None:
        """The step of the schedule, from a ``state_dict``."""
        self.step = state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _check_statistics(self, teacher: Any) -> None:
        if not isinstance(teacher, Mapping) or not all(
            isinstance(one, TeacherStatistics) for one in teacher.values()
        ):
            raise TypeError(
                "teacher must be an nn.Module, None or a mapping from layers to TeacherStatistics; "
                f"got {type(teacher).__name__}"
            )
        if self.loss.measure != "covariance":
            raise ValueError(
                f"measure must be 'covariance' for statistics; got {self.loss.measure!r}"
            )
        missing = [name for name in self._names.values() if name not in teacher]
        if missing:
            raise ValueError(
                f"teacher must have statistics of every layer; there are none of "
                f"{', '.join(map(repr, missing))}, but of {', '.join(map(repr, teacher))}"
            )


def _check_another(teacher: nn.Module, student: nn.Module) -> None:
    """Or it would be trained with the student, which then stays as similar as can be."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    shared = [name for name, p in teacher.named_parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            "teacher must not share trained parameters with the student; it shares "
            f"{shared[0]!r}: give it copy.deepcopy(student), or None where the student has adapters"
        )


def _of_one_dtype(sides: list[Tensor]) -> list[Tensor]:
    """Layers that autocast left in different dtypes, in the widest."""
    dtypes = {side.dtype for side in sides}
    if len(dtypes) == 1:
        return sides
    widest = functools.reduce(torch.promote_types, dtypes)
    return [side.to(widest) for side in sides]
