"""One run of ``examples.ablate``: a finetuning with given settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import rift_kernels as rk

from .data import NEW, OLD, SHOTS, Data, draw_data
from .evaluation import evaluate
from .methods import MEASURES, PRETRAINED
from .model import SIZES, Transformer
from .runs import Run
from .training import PRETRAINING, RATE, Recipe, finetune, pretrain

BATCHES = (8, 15, 30)  # of the 30 new images


class Plan(NamedTuple):
    """A method of finetuning and its settings; the defaults are the base."""

    method: str = "cka"
    weight: float = 1.0
    batch: int = BATCHES[-1]
    debiased: bool = True
    rotation: str = "identity"
    rate: float = RATE


class Start(NamedTuple):
    """The data and the teacher, which all finetunings of a seed share."""

    seed: int
    data: Data
    teacher: Transformer


def prepare(seed: int, recipe: Recipe = PRETRAINING) -> Start:
    data = draw_data(seed, torch.device("cpu"))
    return Start(seed, data, pretrain(data.pretraining, len(OLD), seed, recipe))


def perform(start: Start, plan: Plan, steps: int) -> Run:
    """Finetune as planned and evaluate; for ``PRETRAINED``, only evaluate the pretrained model."""
    seed, data, teacher = start
    if plan.method == PRETRAINED:  # has no head for the new digits
        return evaluate(teacher, teacher, data) | {"new_accuracy": None, "step_ms": None}
    recipe = Recipe(steps, plan.rate, plan.batch)
    model, ms = finetune(teacher, data.shots, len(NEW), rift_loss(plan), seed, recipe)
    return evaluate(model, teacher, data) | {"step_ms": round(ms, 3)}


def rift_loss(plan: Plan) -> rk.RIFTLoss | None:
    """The loss to add, or None for plain finetuning."""
    if plan.method not in MEASURES:
        return None
    settings: dict[str, Any] = {
        "weight": plan.weight,
        "debiased": plan.debiased,
        "rotation": plan.rotation,
    }
    if plan.rotation == "learned":
        settings |= {"student_width": SIZES["width"], "teacher_width": SIZES["width"]}
    return rk.RIFTLoss(plan.method, **settings)


def shared_settings(pretraining: Recipe, steps: int) -> Run:
    """The settings that no plan varies."""
    settings = {f"pretraining_{name}": value for name, value in pretraining._asdict().items()}
    return {"shots": SHOTS, "steps": steps, **settings, **SIZES}
