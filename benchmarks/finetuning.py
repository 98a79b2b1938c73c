"""A finetuning step, in all the ways that are compared: forward, loss, backward, optimiser step.

All ways share one model, one batch and one optimiser. What the optimiser updates are copies of the
weights, so that every step starts from the same weights, even after a loss whose gradient is NaN.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import rift_kernels

from . import baselines, schema
from .oracle import Oracle
from .providers import OURS, WIDE
from .vit import Size, ViT
from .workloads import Inputs, Workload

# A layer's features, or several layers'.
Picked = Tensor | list[Tensor]
Loss = Callable[[Picked, Picked], Tensor]

CLASS_TOKENS, TOKENS = "class tokens", "tokens"


@dataclass(frozen=True)
class Profile:
    """A model, its batch and what of it is compared; effort as in workloads.py."""

    size: Size
    batch: int
    budget: float
    autocast: bool = False
    max_rounds: int = 100
    features: tuple[Features, ...] = ()
    probe: int = 0

    def model(
        self, weights: list[Tensor], rank: int | None = None, trained: list[Tensor] | None = None
    ) -> schema.Model:
        """The description in a result file."""
        return schema.Model(
            **dataclasses.asdict(self.size),
            parameters=sum(p.numel() for p in weights),
            batch=self.batch,
            tokens=self.size.tokens,
            autocast=self.autocast,
            rank=rank,
            trained=None if trained is None else sum(p.numel() for p in trained),
        )


class Batch:
    """Images and their labels, drawn after the model, whose maker sets the seed.

    The images are smooth: patches of one are alike, and images differ, as photographs do.
    """

    def __init__(self, size: Size, batch: int, autocast: bool, device: torch.device) -> None:
        with device:
            coarse = torch.randn(batch, 3, 4, 4)
            self.images = interpolate(coarse, size=(size.image, size.image), mode="bilinear")
            self.labels = torch.randint(size.classes, (batch,))
        self._device, self._autocast = device, autocast

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)


class Optimiser:
    """AdamW, which updates copies of the weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = list(weights)
        self.updated = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self._adamw = torch.optim.AdamW(self.updated, fused=True)

    def backward(self, loss: Tensor) -> None:
        """The backward, and the optimiser's step; no gradient stays in memory."""
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        for weight, updated in zip(self.weights, self.updated, strict=True):
            weight.grad, updated.grad = None, weight.grad
        self._adamw.step()
        self._adamw.zero_grad()


@dataclass(frozen=True)
class Features:
    """What the loss compares: class tokens of all layers, or the last layer's tokens as rows.

    Few rows need debiasing. CKA of many rows is biased: debiasing would change little, and naive
    code is cheapest without it.
    """

    of: str
    dtype: torch.dtype

    @property
    def measure(self) -> str:
        return "cka_debiased" if self.of == CLASS_TOKENS else "cka_biased"

    def pick(self, states: list[Tensor]) -> Picked:
        """The features among the states after every layer."""
        if self.of == CLASS_TOKENS:
            return [state[:, 0].to(self.dtype) for state in states]
        return states[-1].flatten(0, 1).to(self.dtype)

    def workload(self, size: Size, batch: int) -> Workload:
        if self.of == CLASS_TOKENS:
            return Workload(self.measure, batch, size.width, self.dtype, size.depth)
        return Workload(self.measure, batch * size.tokens, size.width, self.dtype)

    def label(self, size: Size, batch: int) -> str:
        return f"{self.of}, {self.workload(size, batch).shape}"


@dataclass(frozen=True)
class Way:
    """A kind of step: the loss that is added and its features, and whether the teacher runs."""

    loss: str | None = None
    features: Features | None = None
    teacher_runs: bool = False


def loss_of(name: str, features: Features) -> Loss:
    """The mean over layers of 1 - CKA, by naive code or by a backend of rift_kernels."""
    if name.startswith(OURS):
        debiased, backend = features.measure == "cka_debiased", name.removeprefix(OURS)
        return rift_kernels.RIFTLoss("cka", debiased=debiased, backend=backend)
    function = baselines.NAIVE[features.measure]

    def naive(student: Picked, teacher: Picked) -> Tensor:
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            return 1 - function(student, teacher)
        pairs = zip(student, teacher, strict=True)
        return torch.stack([1 - function(x, y) for x, y in pairs]).mean()

    def in_float32(student: Picked, teacher: Picked) -> Tensor:
        with torch.autocast(listed(student)[0].device.type, enabled=False):
            return naive(student, teacher)

    return in_float32 if name == WIDE else naive


class Finetuning:
    """A frozen teacher, a student near it, a batch, and the student's optimiser."""

    def __init__(self, size: Size, batch: int, autocast: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.teacher = ViT(size).requires_grad_(False)
        self.batch = Batch(size, batch, autocast, device)
        # Already finetuned a little: where student and teacher agree, the loss has no gradient.
        self.student = copy.deepcopy(self.teacher)
        for parameter in self.student.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        self.optimiser = Optimiser(self.student.requires_grad_().parameters())
        self.size = size

    @torch.no_grad()
    def teachers(self, features: Features | None) -> Picked:
        """The teacher's features: a forward pass that leaves nothing else in memory."""
        with self.batch.autocast():
            states = self.teacher(self.batch.images)
            picked = features.pick(states) if features else []
        # A slice would keep all tokens.
        return picked if isinstance(picked, Tensor) else [x.contiguous() for x in picked]

    def gradient_error(self, name: str, features: Features) -> float:
        """The error of a loss's gradient at the student's features, relative, against float64."""
        with torch.no_grad(), self.batch.autocast():
            picked = features.pick(self.student(self.batch.images))
        teacher = self.teachers(features)
        inputs = Inputs([x.clone().requires_grad_() for x in listed(picked)], listed(teacher))
        student = inputs.students[0] if isinstance(picked, Tensor) else inputs.students
        with self.batch.autocast():
            loss = loss_of(name, features)(student, teacher)
        # The loss is the mean of 1 - CKA; the oracle has the gradient of each layer's CKA.
        gradients = torch.autograd.grad(-len(inputs.students) * loss, inputs.students)
        oracle = Oracle(features.workload(self.size, len(self.batch.images)), inputs)
        return oracle.errors(1 - loss.detach(), gradients)[1]


class Step:
    """A step of one way, in the two phases that are timed."""

    def __init__(self, finetuning: Finetuning, way: Way) -> None:
        self._finetuning, self._way = finetuning, way
        self._loss: Loss | None = None
        self._cached: Picked = []
        if way.loss and way.features:
            self._loss = loss_of(way.loss, way.features)
            if not way.teacher_runs:
                self._cached = finetuning.teachers(way.features)
        self.backward = finetuning.optimiser.backward

    def forward(self) -> Tensor:
        """The passes of the teacher, if it runs, and of the student, and the loss."""
        f, way = self._finetuning, self._way
        teacher = f.teachers(way.features) if way.teacher_runs else self._cached
        with f.batch.autocast():
            states = f.student(f.batch.images)
            loss = cross_entropy(f.student.logits(states), f.batch.labels)
            if self._loss and way.features:
                loss = loss + self._loss(way.features.pick(states), teacher)
        return loss


def listed(picked: Picked) -> list[Tensor]:
    return [picked] if isinstance(picked, Tensor) else picked
