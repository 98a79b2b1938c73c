"""RIFT in a training loop: capture the student's features, run the teacher, return the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from .dispatch import user_warnings
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
    """A :class:`~rift_kernels.RIFTLoss` between layers of a student and its frozen teacher.

    ::

        rift = rk.RIFTRegularizer(model, teacher, layers="encoder.layer.11", pooling="cls")
        for batch in loader:
            loss = model(**batch).loss + rift(**batch)
            loss.backward()

    The student's features are captured while *you* run it. ``rift(...)`` takes the model's inputs,
    runs the teacher on them in eval mode and without gradients, and compares. It does not run the
    student again. Call it once after each pass of the student that gradients flow through, with
    the batch of that pass. If the student runs under ``torch.autocast``, so must the call. It
    cannot detect another batch of the same size, which would be compared wrongly. Where no gradient
    reaches the layers (frozen, below all adapters, or run under ``no_grad``), the loss has none
    either, and warns once.

    The teacher is one of

    - a frozen copy: ``copy.deepcopy(model)`` from before finetuning, or the pretrained model;
    - None, for a student with adapters (a PEFT model such as one with LoRA, or a transformers
      model with ``add_adapter``). The teacher is then the student with its adapters disabled, which
      needs no second copy of the weights. In the compared layers, only adapters may be trained;
    - :class:`~rift_kernels.TeacherStatistics` by layer, from
      :func:`~rift_kernels.collect_teacher_statistics`, for ``measure="covariance"``. No teacher
      runs at all. Collect the statistics with the same ``pooling``. Use many rows in a batch,
      because the covariance of a few rows is noisy.

    Args:
        student: the model to be trained. Wrap it first (DDP, FSDP, PEFT); if it is compiled, it
            must not have been called yet.
        teacher: see above. It is neither trained nor part of this module's state. It must be on
            the student's device (:meth:`move_teacher`).
        layers: names or patterns as for :class:`~rift_kernels.FeatureCapture`; a mapping from the
            student's names to the teacher's where they differ.
        pooling: see :class:`~rift_kernels.FeatureCapture`.
        measure, weight: see :class:`~rift_kernels.RIFTLoss`, like all further settings
            (``margin``, ``group``, ``rotation``, ...). With a learned rotation, give
            ``regularizer.parameters()`` to the optimiser.
        schedule: maps the number of earlier calls that computed gradients to a factor of the
            weight. ``schedule=lambda step: min(1.0, step / 100)`` is a warm-up. The step is part
            of ``state_dict``, as is an adaptive weight: save that in checkpoints.

    Attributes:
        layers: the names of the compared layers of the student.
        distances: the distance of each layer at the last call, without gradient; 1 - similarity
            for ``"cka"`` and ``"procrustes"``. :meth:`metrics` returns them for a logger.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at the call.
        RuntimeError: at a call, if the student was not run before it.
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
        # A tuple keeps both models out of this module's submodules.
        self._models = (student, teacher)
        patterns = list(layers) if isinstance(layers, Mapping) else layers
        self._student = FeatureCapture(student, patterns, pooling)
        self._names = self._teacher_names(layers)
        self._teacher = self._student
        if isinstance(teacher, nn.Module):
            _check_separate(teacher, student)
            self._teacher = FeatureCapture(teacher, list(self._names.values()), pooling)
        elif teacher is None:
            without_adapters(student)
        else:
            self._check_statistics(teacher)

    def _teacher_names(self, layers: Layers) -> dict[str, str]:
        """The teacher's layers by the names of the student's."""
        if not isinstance(layers, Mapping):
            return {name: name for name in self.layers}
        unknown = [name for name in layers if name not in self.layers]
        if unknown or self._models[1] is None:
            raise ValueError(
                "layers must map names of the student's layers, not patterns, to those of a "
                f"separate teacher; got {unknown or 'no separate teacher'}"
            )
        return {name: layers[name] for name in self.layers}

    @property
    def layers(self) -> list[str]:
        """The names of the compared layers of the student."""
        return self._student.layers

    def forward(self, *inputs: Any, mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """The weighted loss of the features of the student's last pass.

        Args:
            inputs, keywords: the arguments of the student's call. ``labels`` are not passed to the
                teacher. Unused where the teacher is statistics.
            mask: (batch, tokens) boolean, True = valid, for the poolings ``"mean"`` and
                ``"tokens"``; None takes the model's ``attention_mask`` (0 = padding), if any.

        Returns:
            A scalar to add to the task's loss.
        """
        if mask is None and self._student.pooling != "cls":
            mask = token_mask(keywords, self._models[0], inputs)
        students = list(self._student.features(mask).values())
        teachers = self._teachers(inputs, keywords, mask)
        row_mask = self._student.mask(mask)
        students = _to_common_dtype(students)
        distances = self._distances(students, teachers, row_mask)
        by_layer = distances.detach().reshape(-1).unbind()
        self.distances = dict(zip(self.layers, by_layer, strict=True))
        # Clearing prevents a second comparison by mistake, and frees the graph.
        self._student.clear()
        loss = self.loss.from_distances(distances)
        if self.schedule is not None:
            loss = self.schedule(self.step) * loss
        if self.training and torch.is_grad_enabled():
            self.step += 1
            self._warn_without_gradient(distances)
        return loss

    def _warn_without_gradient(self, distances: Tensor) -> None:
        if distances.requires_grad or self._warned:
            return
        self._warned = True
        user_warnings.warn(
            "the loss has no gradient: no trained parameter affects "
            f"{', '.join(map(repr, self.layers))}, or the student ran under no_grad"
        )

    def _distances(self, students: list[Tensor], teachers: Any, mask: Tensor | None) -> Tensor:
        try:
            if len(students) == 1:  # a learned rotation takes no list
                return self.loss.distances(students[0], teachers[0], mask)
            return self.loss.distances(students, teachers, mask)
        except ValueError as error:  # the loss checks, so that all processes of a group raise
            if isinstance(teachers[0], Tensor) and len(students[0]) != len(teachers[0]):
                error.add_note("Did the student's last pass use another batch than this call?")
            raise

    def _teachers(
        self, inputs: tuple[Any, ...], keywords: dict[str, Any], mask: Tensor | None
    ) -> Any:
        """The teacher's features or statistics of each layer."""
        student, teacher = self._models
        names = self._names.values()
        if isinstance(teacher, Mapping):
            return [teacher[name] for name in names]
        model = unwrapped(student if teacher is None else teacher)
        adapters = without_adapters(student) if teacher is None else nullcontext()
        with torch.no_grad(), evaluating(model), adapters, self._teacher.fresh() as capture:
            model(*inputs, **without_labels(keywords))
            features = capture.features(mask)
        return _to_common_dtype([features[name] for name in names])

    def metrics(self) -> dict[str, float]:
        """``rift/similarity/<layer>`` (or ``rift/distance/<layer>``) and ``rift/weight``, to log.

        The values are those of the last call; the weight excludes the schedule's factor. Reading
        them makes the host wait for the GPU.
        """
        is_similarity = self.loss.measure in ("cka", "procrustes")
        kind = "similarity" if is_similarity else "distance"
        metrics = {
            f"rift/{kind}/{name}": 1 - float(value) if is_similarity else float(value)
            for name, value in self.distances.items()
        }
        weight = self.loss.weight
        number = weight.value if isinstance(weight, AdaptiveWeight) else weight
        metrics["rift/weight"] = float(number)
        return metrics

    def remove(self) -> None:
        """Remove the hooks."""
        self._student.remove()
        self._teacher.remove()

    def move_teacher(self, device: torch.device | str) -> None:
        """Move the teacher, a model or statistics, to a device; it is not part of this module."""
        _, teacher = self._models
        if teacher is not None:
            modules = teacher.values() if isinstance(teacher, Mapping) else (teacher,)
            for module in modules:
                module.to(device)

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
            isinstance(statistics, TeacherStatistics) for statistics in teacher.values()
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
                "teacher must have statistics of every layer; "
                f"got {', '.join(map(repr, teacher))}, without {', '.join(map(repr, missing))}"
            )


def _check_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher that would be trained with the student and so always be similar to it."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    shared = [name for name, p in teacher.named_parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            "teacher must not share trained parameters with the student; it shares "
            f"{shared[0]!r}: give it copy.deepcopy(student), or None where the student has adapters"
        )


def _to_common_dtype(features: list[Tensor]) -> list[Tensor]:
    """All layers in the widest of their dtypes, which differ under autocast."""
    dtypes = {layer.dtype for layer in features}
    if len(dtypes) == 1:
        return features
    widest = functools.reduce(torch.promote_types, dtypes)
    return [layer.to(widest) for layer in features]
