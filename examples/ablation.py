"""One run of examples/ablate.py: a finetuning with given settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import rift_kernels as rk

from .digits import MODEL, NEW, OLD, SHOTS, Data, Transformer, draw_data
from .finetune_digits import MEASURES, measure
from .runs import Run
from .training import PRETRAINING, RATE, Recipe, finetune, pretrain

PLAIN, PRETRAINED = "plain", "pretrained"
BATCHES = (8, 15, 30)  # of the new images, of which there are 30


class Plan(NamedTuple):
    """One way of finetuning; the defaults are the base."""

    way: str = "cka"
    weight: float = 1.0
    batch: int = BATCHES[-1]
    debiased: bool = True
    rotation: str = "identity"
    rate: float = RATE


class Start(NamedTuple):
    """What all finetunings of a seed share."""

    seed: int
    data: Data
    teacher: Transformer


def begin(seed: int, recipe: Recipe = PRETRAINING) -> Start:
    data = draw_data(seed, torch.device("cpu"))
    return Start(seed, data, pretrain(data.pretraining, len(OLD), seed, recipe))


def perform(start: Start, plan: Plan, steps: int) -> Run:
    """What finetuning as planned gives; of ``PRETRAINED``, what the pretrained model gives."""
    seed, data, teacher = start
    if plan.way == PRETRAINED:  # has no head for the new digits
        return measure(teacher, teacher, data) | {"new_accuracy": None, "step_ms": None}
    recipe = Recipe(steps, plan.rate, plan.batch)
    model, ms = finetune(teacher, data.shots, len(NEW), loss(plan), seed, recipe)
    return measure(model, teacher, data) | {"step_ms": round(ms, 3)}


def loss(plan: Plan) -> rk.RIFTLoss | None:
    """The loss that is added; none for plain finetuning."""
    if plan.way not in MEASURES:
        return None
    how: dict[str, Any] = {
        "weight": plan.weight,
        "debiased": plan.debiased,
        "rotation": plan.rotation,
    }
    if plan.rotation == "learned":
        how |= {"student_width": MODEL["width"], "teacher_width": MODEL["width"]}
    return rk.RIFTLoss(plan.way, **how)


def shared(pretraining: Recipe, steps: int) -> Run:
    """The settings that no plan varies."""
    settings = {f"pretraining_{name}": value for name, value in pretraining._asdict().items()}
    return {"shots": SHOTS, "steps": steps, **settings, **MODEL}
