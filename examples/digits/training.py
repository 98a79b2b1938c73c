"""Pretraining, and finetuning near a frozen teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rift_kernels as rk

from .data import Images, jitter
from .model import SIZES, Transformer

Loss = Callable[[Tensor, Tensor], Tensor]
Tick = Callable[[], None]  # called after every step


class Recipe(NamedTuple):
    """Settings of a training; ``batch`` is limited by the number of images."""

    steps: int
    rate: float
    batch: int = 60


PRETRAINING = Recipe(300, 5e-3)
# Among learning rates from 5e-4 to 8e-3, plain finetuning was best at 4e-3 and 6e-3, on other seeds
# and on images not used here. Lower rates forget less, so plain finetuning also runs with those.
RATE, LOWER_RATES = 4e-3, (2e-3, 1e-3, 5e-4)
FINETUNING = Recipe(200, RATE)  # all 30 new images fit in one batch


def train(
    model: nn.Module,
    images: Images,
    compute_loss: Loss,
    seed: int,
    recipe: Recipe,
    tick: Tick,
    rotation: nn.Module | None = None,
) -> float:
    """Train by AdamW with warm-up and cosine decay; return the median time of a step in ms."""
    steps, rate, batch = recipe
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if rotation is not None and (parameters := list(rotation.parameters())):
        groups.append(
            {"params": parameters, "weight_decay": 0.0}
        )  # a rotation has no size to shrink
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(groups, rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    pixels, labels = images
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        rows = torch.randperm(len(pixels), generator=generator)[:batch].to(pixels.device)
        loss = compute_loss(jitter(pixels[rows], generator), labels[rows])
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
    """Train a new transformer, and freeze it."""
    torch.manual_seed(seed)
    model = Transformer(classes, **SIZES).to(images[0].device)

    def compute_loss(pixels: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model.head(model.features(pixels)), labels)

    train(model, images, compute_loss, seed, recipe, tick)
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
    """Finetune a copy of the teacher with a new head; return it and the time of a step in ms.

    With ``frozen``, only the head is trained.
    """
    model = copy.deepcopy(teacher).requires_grad_(not frozen)
    model.head = nn.Linear(model.head.in_features, classes, device=images[0].device)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)

    def compute_loss(pixels: Tensor, labels: Tensor) -> Tensor:
        features = model.features(pixels)
        loss = cross_entropy(model.head(features), labels)
        if rift is not None:
            with torch.no_grad():
                pretrained = teacher.features(pixels)
            loss = loss + rift(features, pretrained)
        return loss

    return model, train(model, images, compute_loss, seed, recipe, tick, rift)
