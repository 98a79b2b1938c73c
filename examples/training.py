"""What the examples share: pretraining, finetuning near a frozen teacher, and accuracies."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rift_kernels as rk

from .digits import MODEL, Images, Transformer, jitter

Loss = Callable[[Tensor, Tensor], Tensor]
Tick = Callable[[], None]  # called after every step


class Recipe(NamedTuple):
    """How to train; ``batch`` is at most the number of images."""

    steps: int
    rate: float
    batch: int = 60


PRETRAINING = Recipe(300, 5e-3)
# Of the learning rates 5e-4 to 8e-3, plain finetuning was best at 4e-3 and 6e-3, on other seeds and
# on images not used here. Lower ones forget less, so plain finetuning is drawn with them too.
RATE, LOWER_RATES = 4e-3, (2e-3, 1e-3, 5e-4)
FINETUNING = Recipe(200, RATE)  # all 30 new images are one batch


def train(
    model: nn.Module,
    images: Images,
    loss_of: Loss,
    seed: int,
    recipe: Recipe,
    tick: Tick,
    rotation: nn.Module | None = None,
) -> float:
    """AdamW with a warm-up and a cosine decay; returns the median time of a step in ms."""
    steps, rate, batch = recipe
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if rotation is not None and (learned := list(rotation.parameters())):
        groups.append({"params": learned, "weight_decay": 0.0})  # there is nothing to shrink
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(groups, rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    pixels, labels = images
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        rows = torch.randperm(len(pixels), generator=generator)[:batch].to(pixels.device)
        loss = loss_of(jitter(pixels[rows], generator), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if pixels.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        tick()
    return float(np.median(times))


def no_tick() -> None:
    pass


def pretrain(
    images: Images,
    classes: int,
    seed: int,
    recipe: Recipe = PRETRAINING,
    tick: Tick = no_tick,
) -> Transformer:
    """A transformer trained from nothing, frozen."""
    torch.manual_seed(seed)
    model = Transformer(classes, **MODEL).to(images[0].device)

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model.head(model.features(pixels)), labels)

    train(model, images, loss_of, seed, recipe, tick)
    return model.requires_grad_(False)


def finetune(
    teacher: Transformer,
    images: Images,
    classes: int,
    rift: rk.RIFTLoss | None,
    seed: int,
    recipe: Recipe = FINETUNING,
    tick: Tick = no_tick,
    *,
    frozen: bool = False,
) -> tuple[Transformer, float]:
    """A copy of the teacher with a new head, finetuned, and the time of a step in ms.

    ``frozen``: only the head is trained.
    """
    model = copy.deepcopy(teacher).requires_grad_(not frozen)
    model.head = nn.Linear(model.head.in_features, classes, device=images[0].device)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        features = model.features(pixels)
        loss = cross_entropy(model.head(features), labels)
        if rift is not None:
            with torch.no_grad():
                pretrained = teacher.features(pixels)
            loss = loss + rift(features, pretrained)
        return loss

    return model, train(model, images, loss_of, seed, recipe, tick, rift)


@torch.no_grad()
def accuracy(model: Transformer, images: Images, head: nn.Linear | None = None) -> float:
    """Percent of the images that the model, or its features and another head, get right."""
    classify = model.head if head is None else head
    hits = classify(model.features(images[0])).argmax(1) == images[1]
    return 100 * hits.float().mean().item()


@torch.no_grad()
def refitted_accuracy(model: Transformer, training: Images, test: Images) -> float:
    """The same of a linear classifier fitted to the model's features of ``training``."""
    seen, unseen = (model.features(pixels).cpu().numpy() for pixels, _ in (training, test))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(seen, training[1].cpu().numpy())
    return 100 * float(probe.score(unseen, test[1].cpu().numpy()))
