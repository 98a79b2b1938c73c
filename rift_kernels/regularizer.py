"""RIFT in a training loop: capture the student's features, run the teacher, return the loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .dispatch import checks
from .features import adapters, placement
from .features.capture import FeatureCapture, nothing_captured
from .features.hooks import Call
from .features.pooling import Pooling
from .features.statistics import TeacherStatistics
from .features.teacher_pass import Forward, TeacherPass
from .features.token_masks import AUTO, LayerMask, TokenMask, TokenMasks
from .features.training_warnings import TrainingWarnings
from .losses import RIFTLoss
from .weighting import AdaptiveWeight

Layers = str | Sequence[str] | Mapping[str, str]
TeacherLike = nn.Module | Mapping[str, TeacherStatistics] | None


class RIFTRegularizer(nn.Module):
    """A :class:`~rift_kernels.RIFTLoss` between layers of a student and its frozen teacher.

    ::

        rift = rk.RIFTRegularizer(model, teacher, layers="encoder.layer.11", pooling="cls")
        for batch in loader:
            loss = model(**batch).loss + rift()
            loss.backward()

    The student's features are captured while *you* run it, and so is its call. ``rift()`` runs the
    teacher on the same arguments, in eval mode, without gradients and under the same autocast, and
    compares. It does not run the student again. Call it once after each pass of the student that
    gradients flow through, and add it to the loss before the backward. A pass without gradients
    never takes the place of one with them.

    ``rift(*args, **kwargs)`` calls the teacher with other arguments. It has to be used where the
    student is run in parts (``model.features(x)``, ``model.head(...)``), changes its inputs in
    place, or gets ``past_key_values``.

    The teacher is one of

    - a frozen copy: ``copy.deepcopy(model)`` from before finetuning, or the pretrained model. It
      may have another dtype: floating inputs are cast to it;
    - None, for a student with adapters (a PEFT model such as one with LoRA, or a transformers
      model with ``add_adapter``). The teacher is then the student with its adapters disabled, which
      needs no second copy of the weights. Prompt learning, initialisations that change the
      pretrained weights (PiSSA, OLoRA, ...) and trained parameters outside adapters that affect
      the compared layers are refused, because the teacher would not be the pretrained model;
    - :class:`~rift_kernels.TeacherStatistics` by layer, from
      :func:`~rift_kernels.collect_teacher_statistics`, for ``measure="covariance"``. No teacher
      runs at all. Collect the statistics with the same ``pooling``. Use many rows in a batch,
      because the covariance of a few rows is noisy.

    The teacher's pass gets what the student's got, but for three things: ``labels`` where its
    forward does not take them, ``use_cache=False`` where it has one, and ``torch.nn``'s inference
    path, which is off. From the second step on, it ends once the compared layers have run. This is
    left out where they run more than once in a pass, where their outputs are changed in place, with
    ``forward=``, and where hooks around them await the end of a pass (the user's, or those of FSDP,
    DeepSpeed and accelerate).

    Args:
        student: the model to be trained. Wrap it first (DDP, FSDP, PEFT); if it is compiled, it
            must not have been called yet.
        teacher: see above. It is neither trained nor part of this module's state. It must be on
            the student's device (:meth:`move_teacher`).
        layers: names or patterns as for :class:`~rift_kernels.FeatureCapture`; a mapping from the
            student's names to the teacher's where they differ. A layer that the student skips at
            random (LayerDrop) leaves the loss of that step, and :meth:`metrics`.
        pooling: see :class:`~rift_kernels.FeatureCapture`.
        measure, weight: see :class:`~rift_kernels.RIFTLoss`, like all further settings
            (``margin``, ``group``, ``rotation``, ...). With a learned rotation, give
            ``regularizer.parameters()`` to the optimiser.
        schedule: maps the number of earlier calls that computed gradients to a factor of the
            weight. ``schedule=lambda step: min(1.0, step / 100)`` is a warm-up. The step is part
            of ``state_dict``, as is an adaptive weight: save that in checkpoints.
        token_mask: which tokens of a layer count, for all poolings but ``"cls"``:

            - ``"auto"``: the ``attention_mask`` (batch, tokens), 0 = padding, that the nearest
              module around the layer was called with. So frames of audio get the mask of frames, a
              decoder its own (without one, the labels that are not -100), and images beside a
              text none. A mask that reaches a layer in no form warns once, and does not count.
              ``src_key_padding_mask`` of ``torch.nn`` does;
            - None: all tokens;
            - the name of an argument of the student that is the mask: True or nonzero = valid.
              Where True is padding, ``lambda call: ~call["mask"]``;
            - a function that maps the student's arguments, a dictionary by name, to a boolean
              mask (batch, tokens), True = valid, or None;
            - a mapping from names or patterns of layers to any of these. What it does not mention
              is ``"auto"``.

            Masks of floating point are refused: some are added to scores, and some are 1 at valid
            tokens.
        forward: calls the teacher in another way: ``lambda teacher, *args, **kwargs:
            teacher.encode(*args)``. The return value is ignored.
        replay_rng: give the teacher's pass the random numbers of the student's. For models that
            draw some in eval mode, too, such as masked autoencoders. The numbers are the same up
            to the student's first dropout. The student must not be compiled as a part of another
            model.

    Attributes:
        layers: the names of the compared layers of the student.
        distances: the distance of each layer at the last call, without gradient; 1 - similarity
            for ``"cka"`` and ``"procrustes"``. :meth:`metrics` returns them for a logger.
        token_masks: where the mask of each layer came from at the last call, such as
            ``"encoder.attention_mask"``; empty for ``"cls"``.

    Raises:
        TypeError, ValueError: naming the argument, at construction or at the call. An error of the
            teacher's model has a note that it was the teacher's pass.
        RuntimeError: at a call: the student was not run before it, a layer is not on its path, or
            its arguments are not known any more.

    Warns:
        UserWarning: once each, where layers have no gradient, features are the same in every row, a
        mask is not that of a layer, the student ran twice, the teacher draws random numbers, or it
        shares running statistics that move with the training.

    A regulariser that is copied or pickled together with its models captures the copies.
    """

    steps: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherLike = None,
        *,
        layers: Layers,
        measure: str = "cka",
        weight: float | AdaptiveWeight = 1.0,
        schedule: Callable[[int], float] | None = None,
        pooling: Pooling = "cls",
        token_mask: TokenMask = AUTO,
        forward: Forward | None = None,
        replay_rng: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module; got {type(student).__name__}")
        for name, function in (("schedule", schedule), ("forward", forward)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable or None; got {type(function).__name__}")
        checks.flag("replay_rng", replay_rng)
        if settings.get("reduction") == "none":
            raise ValueError("reduction must be 'mean' or 'sum' for a loss to add; got 'none'")
        known = inspect.signature(RIFTLoss).parameters
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise TypeError(
                f"RIFTRegularizer has no argument {unknown[0]!r}; beside its own it takes those of "
                f"RIFTLoss: {', '.join(known)}"
            )
        if isinstance(token_mask, Tensor):
            raise TypeError(
                "token_mask must not be a tensor here, because it would serve every batch: give "
                "it in the call, rift(token_mask=...), or a function of the student's arguments"
            )
        self.loss = RIFTLoss(measure, weight=weight, **settings)
        self.schedule = schedule
        self.distances: dict[str, Tensor] = {}
        self.token_masks: dict[str, str] = {}
        with torch.inference_mode(False):  # an inference tensor could never be updated
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._step = 0  # the same number, read without waiting for a GPU
        self._warnings = TrainingWarnings()
        self._called: set[str] = set()  # layers that any pass of the student has called
        # A tuple keeps both models out of this module's submodules.
        self._models = (student, teacher)
        if teacher is None:
            adapters.check_adapters(student)
        patterns = list(layers) if isinstance(layers, Mapping) else layers
        self._student = FeatureCapture(student, patterns, pooling)
        self._student.recorder.keeps_random = replay_rng
        try:
            self._masks = TokenMasks(token_mask, self._student, student)
            self._names = self._teacher_names(layers)
            capture = self._captured_teacher(pooling)
        except BaseException:
            self._student.remove()
            raise
        model = teacher if isinstance(teacher, nn.Module) else None
        self._teacher = TeacherPass(student, model, capture, self._names, forward)

    def _captured_teacher(self, pooling: Pooling) -> FeatureCapture:
        """The capture of the teacher's features: the student's own if it is its own teacher."""
        student, teacher = self._models
        if not isinstance(teacher, nn.Module):
            if teacher is not None:
                self._check_statistics(teacher)
            return self._student
        _check_separate(teacher, student)
        virtual = adapters.virtual_tokens(student)
        if virtual and isinstance(pooling, str) and pooling != "last":
            raise ValueError(
                f"pooling must be 'last' or a function for a student with {virtual} virtual "
                f"tokens, which its teacher does not have; got {pooling!r}"
            )
        return FeatureCapture(teacher, list(self._names.values()), pooling)

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
    def student(self) -> nn.Module:
        """The model that is trained."""
        return self._models[0]

    @property
    def layers(self) -> list[str]:
        """The names of the compared layers of the student."""
        return self._student.layers

    @property
    def step(self) -> int:
        """The number of calls that computed gradients, for the schedule."""
        return self._step

    def forward(self, *inputs: Any, token_mask: TokenMask = AUTO, **keywords: Any) -> Tensor:
        """The weighted loss of the features of the student's last pass.

        Args:
            inputs, keywords: nothing, and the teacher is called as the student was. Otherwise the
                arguments for the teacher. Unused where the teacher is statistics.
            token_mask: replaces that of the constructor in this call.

        Returns:
            A scalar to add to the task's loss.
        """
        given = Call(inputs, keywords) if inputs or keywords else None
        outputs, latest = self._student.outputs(), self._student.latest
        latest.is_unused = False
        if not outputs and latest.call is None:
            raise RuntimeError(nothing_captured(self.layers, was_called=False))
        call = latest.call if given is None else given
        masks = self._masks.of(outputs, call, self._student.kind, given is None, token_mask)
        by_name = {name: found.mask for name, found in masks.items()}
        students = self._student.pooled(outputs, by_name)
        teachers = self._teachers(given, students, by_name)
        self.token_masks = {name: found.source for name, found in masks.items()}
        if self.training and torch.is_grad_enabled():
            self._warn(students, teachers, masks)
            if self._warnings.is_first_step:
                overlooked = self._masks.overlooked(outputs, call, masks)
                if overlooked:
                    self._warnings.warn_of_an_overlooked_mask(*overlooked)
            self._warnings.is_first_step = False
        loss = self._loss(students, teachers, by_name)
        # Clearing prevents a second comparison by mistake, and frees the graph.
        self._student.clear()
        if self.training and torch.is_grad_enabled():
            self._step += 1
            self.steps += 1
        return loss

    def _loss(
        self,
        students: dict[str, Tensor],
        teachers: dict[str, Any],
        masks: Mapping[str, Tensor | None],
    ) -> Tensor:
        self.distances = {}
        if not students:  # the student skipped every layer
            return self.steps.new_zeros((), dtype=torch.float32)
        distances = self._distances(
            _to_common_dtype(list(students.values())),
            list(teachers.values()),
            self._row_masks(students, masks),
        )
        by_layer = distances.detach().reshape(-1).unbind()
        self.distances = dict(zip(students, by_layer, strict=True))
        loss = self.loss.from_distances(distances)
        return loss if self.schedule is None else self.schedule(self._step) * loss

    def _row_masks(
        self, students: Mapping[str, Tensor], masks: Mapping[str, Tensor | None]
    ) -> Tensor | list[Tensor] | None:
        """The masks of the features' rows, one tensor where all layers share it."""
        rows = [self._student.mask(masks.get(name)) for name in students]
        if all(mask is None for mask in rows):
            return None
        distinct = {id(masks.get(name)) for name in students}
        if len(distinct) == 1:
            return rows[0]
        return [
            x.new_ones(len(x), dtype=torch.bool) if mask is None else mask
            for mask, x in zip(rows, students.values(), strict=True)
        ]

    def _distances(
        self, students: list[Tensor], teachers: Any, mask: Tensor | list[Tensor] | None
    ) -> Tensor:
        try:
            if len(students) == 1:  # a learned rotation takes no list
                mask = mask[0] if isinstance(mask, list) else mask
                return self.loss.distances(students[0], teachers[0], mask)
            return self.loss.distances(students, teachers, mask)
        except ValueError as error:  # the loss checks, so that all processes of a group raise
            if isinstance(teachers[0], Tensor) and len(students[0]) != len(teachers[0]):
                error.add_note("Did the student's last pass use another batch than this call?")
            raise

    def _teachers(
        self,
        given: Call | None,
        students: dict[str, Tensor],
        masks: Mapping[str, Tensor | None],
    ) -> dict[str, Any]:
        """The teacher's features or statistics of each of the student's layers.

        A layer that the student skipped at random, and only that, may be missing in ``students``.
        """
        teacher = self._models[1]
        skipped = [name for name in self.layers if name not in students]
        if skipped and self.loss.group is not None:
            raise RuntimeError(
                f"the student skipped {', '.join(map(repr, skipped))}, which processes of a group "
                "cannot do, because they compare each layer together: switch LayerDrop off"
            )
        if isinstance(teacher, Mapping):
            self._called |= students.keys()
            never = [name for name in skipped if name not in self._called]
            if never:
                raise RuntimeError(nothing_captured(never, was_called=True))
            return {name: teacher[self._names[name]] for name in students}
        features = self._teacher.features(
            given, self._student, list(students), masks, self._warnings
        )
        common = _to_common_dtype(list(features.values()))
        return {
            name: theirs.to(own.device)
            for (name, own), theirs in zip(students.items(), common, strict=True)
        }

    def _warn(
        self, students: dict[str, Tensor], teachers: dict[str, Any], masks: dict[str, LayerMask]
    ) -> None:
        """Say, once each, what makes the loss other than the user may think."""
        if self._student.recorder.was_replaced:
            self._warnings.warn_of_a_replaced_pass()
        dropped = [name for name, found in masks.items() if found.was_dropped]
        if dropped:
            self._warnings.warn_of_dropped_masks(dropped)
        detached = [
            name
            for name, layer in students.items()
            if not layer.requires_grad and name not in self._student.detached()
        ]
        if detached:
            self._warnings.warn_without_gradient(detached, is_all=len(detached) == len(students))
        self._warnings.warn_of_constants(students, teachers)
        if self._models[1] is None:
            self._warnings.warn_of_running_statistics(self._models[0])
            self._warnings.check_base(students, self._models[0])

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

    def extra_repr(self) -> str:
        """What is compared."""
        teacher = self._models[1]
        if isinstance(teacher, Mapping):
            name = "statistics"
        else:
            name = "its adapters disabled" if teacher is None else type(teacher).__name__
        return f"layers={self.layers}, pooling={self._student.pooling!r}, teacher={name}"

    def remove(self) -> None:
        """Remove the hooks."""
        self._student.remove()
        self._teacher.capture.remove()

    def clear(self) -> None:
        """Forget the student's last pass, which is then not compared, and release its memory."""
        self._student.clear()

    def move_teacher(self, device: torch.device | str) -> None:
        """Move the teacher, a model or statistics, to a device; it is not part of this module.

        A model that Accelerate dispatched (``device_map="auto"``) or that FSDP shards stays where
        it is, because its hooks bring its inputs there. ValueError if it cannot be moved, as some
        quantised models.
        """
        _, teacher = self._models
        if isinstance(teacher, nn.Module):
            placement.move(teacher, device)
        elif teacher is not None:
            for statistics in teacher.values():
                statistics.to(device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._step = int(self.steps)

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
    if len(dtypes) <= 1:
        return features
    widest = functools.reduce(torch.promote_types, dtypes)
    return [layer.to(widest) for layer in features]
