"""A LoRA finetuning step of transformers' ViT, plain and with what RIFT adds to it, in parts.

Every way of finetuning has modules of its own, so that none has another's hooks, but all share
their weights, one batch and one optimiser. As in finetuning.py, what it updates are copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import rift_kernels as rk
from rift_kernels.features.forward_pass import evaluating, without_adapters

from .vit import Size

RANK = 8
ADAPTERS_OFF, COPY = "adapters off", "a copy"
# Query, key, value and output of an attention, as transformers 5 and 4 call them.
_TARGETS = r".*\.(?:[qkvo]_proj|query|key|value|attention\.output\.dense)"


class NotInstalledError(ImportError):
    """Which packages are missing; the message is for the user."""


@dataclass(frozen=True)
class Way:
    """Who the teacher is, if one runs, and the pooling of what is compared with it, if anything."""

    teacher: str | None = None
    pooling: str | None = None


class Adapted:
    """A ViT with random weights, low-rank adapters on its attentions, and a linear head."""

    def __init__(self, size: Size, batch: int, autocast: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, self.device, self.autocasts = size, device, autocast
        self.layer = f"*layer*.{size.depth - 1}"
        self.model = _with_adapters(size).to(device)
        with device:
            self.head = nn.Linear(size.width, size.classes)
            # Smooth: patches of one image are alike, and images differ, as photographs do.
            coarse = torch.randn(batch, 3, 4, 4)
            self.images = interpolate(coarse, size=(size.image, size.image), mode="bilinear")
            self.labels = torch.randint(size.classes, (batch,))
        self.trained = [
            p for p in (*self.model.parameters(), *self.head.parameters()) if p.requires_grad
        ]
        self.updated = [p.detach().clone().requires_grad_() for p in self.trained]
        self.optimiser = torch.optim.AdamW(self.updated, fused=True)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The model's, its adapters' and the head's."""
        yield from self.model.parameters()
        yield from self.head.parameters()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts)

    def student(self) -> Any:
        """The model in modules of its own, with the same weights."""
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared).train()

    def pretrained(self) -> Any:
        """A second copy of the weights, those before the adapters."""
        with torch.no_grad():
            return copy.deepcopy(self.model).unload().eval().requires_grad_(False)


class TeacherPass:
    """The student without its adapters: no gradients, its features caught, nothing compared."""

    def __init__(self, adapted: Adapted, student: Any = None) -> None:
        self._adapted = adapted
        self._student = adapted.student() if student is None else student
        self._capture = rk.FeatureCapture(self._student, adapted.layer, "tokens")

    def forward(self) -> Tensor:
        """What :class:`~rift_kernels.RIFTRegularizer` does before it compares."""
        student, f = self._student, self._adapted
        off = without_adapters(student)
        with torch.no_grad(), evaluating(student), off, f.autocast(), self._capture.fresh():
            student(pixel_values=f.images)
            (features,) = self._capture.features().values()
        return features

    def backward(self, _values: object) -> None:
        """There is none."""

    def forget(self) -> None:
        """The student's features, caught and not compared."""
        self._capture.clear()


class Step:
    """A step of one way, in the two phases that are timed."""

    def __init__(self, adapted: Adapted, way: Way) -> None:
        self._adapted = adapted
        self._student = adapted.student()
        self._rift: rk.RIFTRegularizer | None = None
        self._teacher: TeacherPass | None = None
        if way.pooling:
            teacher = adapted.pretrained() if way.teacher == COPY else None
            self._rift = rk.RIFTRegularizer(
                self._student, teacher, layers=adapted.layer, pooling=way.pooling
            )
        elif way.teacher:
            self._teacher = TeacherPass(adapted, self._student)

    def forward(self) -> Tensor:
        """The student, the task's loss, and what the way adds."""
        f = self._adapted
        with f.autocast():
            states = self._student(pixel_values=f.images).last_hidden_state
            loss = cross_entropy(f.head(states[:, 0]), f.labels)
            if self._rift:
                loss = loss + self._rift(pixel_values=f.images)
        if self._teacher:
            self._teacher.forward()
            self._teacher.forget()
        return loss

    def backward(self, loss: Tensor) -> None:
        """The backward, and the optimiser's step; no gradient stays in memory."""
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        f = self._adapted
        for weight, updated in zip(f.trained, f.updated, strict=True):
            weight.grad, updated.grad = None, weight.grad
        f.optimiser.step()
        f.optimiser.zero_grad()


class LossAlone:
    """The loss on the states of the last layer that a step caught, down to their gradient."""

    def __init__(self, adapted: Adapted, pooling: str) -> None:
        self._pooling, self._autocast = pooling, adapted.autocast
        self._loss = rk.RIFTLoss()
        student = adapted.student()
        with (
            torch.no_grad(),
            adapted.autocast(),
            rk.FeatureCapture(student, adapted.layer, "tokens") as capture,
        ):
            student(pixel_values=adapted.images)
            (own,) = capture.features().values()
            teachers = TeacherPass(adapted, student).forward()
        shape = (len(adapted.images), -1, adapted.size.width)
        self._student = own.view(shape).requires_grad_()
        self._teacher = teachers.view(shape)

    def rows(self, states: Tensor) -> Tensor:
        """What the regularizer compares of them."""
        return states[:, 0] if self._pooling == "cls" else states.flatten(0, 1)

    def forward(self) -> Tensor:
        with self._autocast():
            return self._loss(self.rows(self._student), self.rows(self._teacher))

    def backward(self, loss: Tensor) -> None:
        torch.autograd.grad(loss, self._student)


class Setup:
    """What a way has beside the model, made anew."""

    def __init__(self, adapted: Adapted, way: Way) -> None:
        self._adapted, self._way, self._made = adapted, way, list[Step]()

    def forward(self) -> Tensor:
        self._made.append(Step(self._adapted, self._way))
        return self._adapted.labels

    def backward(self, _values: object) -> None:
        """There is none."""


def _with_adapters(size: Size) -> Any:
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
            # Already finetuned a little: where it is the teacher, the loss has no gradient.
            nn.init.normal_(parameter, std=0.02)
    return model
