"""A LoRA finetuning step of transformers' ViT, plain and with what RIFT adds to it, in parts.

Every way of finetuning has modules of its own, so that none has another's hooks, but all share
their weights, one batch and one optimiser (see finetuning.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rift_kernels as rk
from rift_kernels.features.forward_pass import evaluating, without_adapters

from .finetuning import Batch, Optimiser
from .vit import Size

RANK = 8
ADAPTERS_OFF, COPY = "adapters off", "a copy"
# Query, key, value and output of an attention, as transformers 5 and 4 call them.
_TARGETS = r".*\.(?:[qkvo]_proj|query|key|value|attention\.output\.dense)"


class NotInstalledError(ImportError):
    """Packages are missing; the message names them for the user."""


@dataclass(frozen=True)
class Way:
    """The teacher, if one runs, and the pooling of the features that are compared, if any are."""

    teacher: str | None = None
    pooling: str | None = None


class Adapted:
    """A ViT with random weights, low-rank adapters on its attentions, and a linear head."""

    def __init__(self, size: Size, batch: int, autocast: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, self.layer = size, f"*layer*.{size.depth - 1}"
        self.model = with_adapters(size).to(device)
        with device:
            self.head = nn.Linear(size.width, size.classes)
        self.batch = Batch(size, batch, autocast, device)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimiser = Optimiser(p for p in self.parameters if p.requires_grad)

    def student(self) -> Any:
        """The model in modules of its own, with the same weights."""
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared).train()

    def pretrained(self) -> Any:
        """A second copy of the weights, as they were before the adapters."""
        with torch.no_grad():
            return copy.deepcopy(self.model).unload().eval().requires_grad_(False)


class TeacherPass:
    """A pass of the student without its adapters: features are caught and not compared."""

    def __init__(self, adapted: Adapted, student: Any) -> None:
        self._batch, self._student = adapted.batch, student
        self.capture = rk.FeatureCapture(student, adapted.layer, "tokens")

    def forward(self) -> Tensor:
        """The same as :class:`~rift_kernels.RIFTRegularizer` does before it compares."""
        student, batch = self._student, self._batch
        off = without_adapters(student)
        with torch.no_grad(), evaluating(student), off, batch.autocast(), self.capture.fresh():
            student(pixel_values=batch.images)
            (features,) = self.capture.features().values()
        return features


class Step:
    """A step of one way, in the two phases that are timed."""

    def __init__(self, adapted: Adapted, way: Way) -> None:
        self._adapted, self.student = adapted, adapted.student()
        self._rift: rk.RIFTRegularizer | None = None
        self._teacher: TeacherPass | None = None
        if way.pooling:
            teacher = adapted.pretrained() if way.teacher == COPY else None
            self._rift = rk.RIFTRegularizer(
                self.student, teacher, layers=adapted.layer, pooling=way.pooling
            )
        elif way.teacher:
            self._teacher = TeacherPass(adapted, self.student)
        self.backward = adapted.optimiser.backward

    def forward(self) -> Tensor:
        """The student's pass, the task's loss, and what the way adds."""
        batch = self._adapted.batch
        with batch.autocast():
            states = self.student(pixel_values=batch.images).last_hidden_state
            loss = cross_entropy(self._adapted.head(states[:, 0]), batch.labels)
            if self._rift:
                loss = loss + self._rift(pixel_values=batch.images)
        if self._teacher:
            self._teacher.forward()
            # The student's features were caught, too.
            self._teacher.capture.clear()
        return loss


class LossAlone:
    """The loss by itself, on the states of the last layer, down to their gradient."""

    def __init__(self, adapted: Adapted, pooling: str) -> None:
        self._pooling, self._batch, self._loss = pooling, adapted.batch, rk.RIFTLoss()
        student = adapted.student()
        capture = rk.FeatureCapture(student, adapted.layer, "tokens")
        with torch.no_grad(), self._batch.autocast(), capture:
            student(pixel_values=self._batch.images)
            (states,) = capture.features().values()
            teachers = TeacherPass(adapted, student).forward()
        shape = (len(self._batch.images), -1, adapted.size.width)
        self._student = states.view(shape).requires_grad_()
        self._teacher = teachers.view(shape)

    def rows(self, states: Tensor) -> Tensor:
        """The features that the regularizer compares."""
        return states[:, 0] if self._pooling == "cls" else states.flatten(0, 1)

    def forward(self) -> Tensor:
        with self._batch.autocast():
            return self._loss(self.rows(self._student), self.rows(self._teacher))

    def backward(self, loss: Tensor) -> None:
        torch.autograd.grad(loss, self._student)


def with_adapters(size: Size) -> Any:
    try:
        import peft
        import transformers
    except ImportError as error:
        raise NotInstalledError(
            f"this needs transformers and peft: pip install 'rift_kernels[bench]' ({error})"
        ) from error
    config = transformers.ViTConfig(
        image_size=size.image,
        patch_size=size.patch,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
    )
    base = transformers.ViTModel(config, add_pooling_layer=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, target_modules=_TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # Already finetuned a little: where student and teacher agree, the loss has no gradient.
            nn.init.normal_(parameter, std=0.02)
    return model
