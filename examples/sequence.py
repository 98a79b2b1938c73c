"""One run of examples/continual.py: a sequence of tasks, learned in one way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import rift_kernels as rk

from .digits import MODEL, SHOTS, TASKS, Task, Transformer, draw_tasks
from .finetune_digits import MEASURES, PROBE, Plan
from .runs import Run
from .training import (
    PRETRAINING,
    Recipe,
    accuracy,
    finetune,
    pretrain,
    refitted_accuracy,
)


class Start(NamedTuple):
    """What all ways of a seed share: the model after the first task."""

    seed: int
    tasks: list[Task]
    model: Transformer


def begin(seed: int, recipe: Recipe = PRETRAINING) -> Start:
    tasks = draw_tasks(seed, torch.device("cpu"))
    return Start(seed, tasks, pretrain(tasks[0].training, len(TASKS[0][0]), seed, recipe))


def perform(start: Start, plan: Plan, steps: int) -> Run:
    """Accuracies after each task: ``accuracy[i][j]`` is task j's after task i, by its own head.

    ``refitted[i][j]`` is that of a linear classifier fitted to the features after task i. The loss
    compares with the model after the task before, which is frozen.
    """
    seed, tasks, model = start
    rift = rk.RIFTLoss(plan.way, weight=plan.weight) if plan.way in MEASURES else None
    recipe = Recipe(steps, plan.rate)
    heads: list[nn.Linear] = []
    found: Run = {"accuracy": [], "refitted": []}
    for i, task in enumerate(tasks):
        if i:
            before, frozen = model.requires_grad_(False), plan.way == PROBE
            classes = len(TASKS[i][0])
            arguments = (before, task.training, classes, rift, seed, recipe)
            model, _ = finetune(*arguments, frozen=frozen)
        heads.append(model.head)
        seen = list(zip(tasks, heads, strict=False))  # those so far
        found["accuracy"].append([accuracy(model, old.test, head) for old, head in seen])
        found["refitted"].append([refitted_accuracy(model, *old) for old, _ in seen])
    return found


def average(accuracies: list[list[float]]) -> float:
    """Of all tasks, after the last."""
    return sum(accuracies[-1]) / len(accuracies[-1])


def forgetting(accuracies: list[list[float]]) -> float:
    """Mean over all tasks but the last of the best accuracy before it, less that after it."""
    last = len(accuracies) - 1
    losses = [
        max(accuracies[i][j] for i in range(j, last)) - accuracies[last][j] for j in range(last)
    ]
    return sum(losses) / last


def shared(pretraining: Recipe, steps: int) -> Run:
    """The settings that no plan varies."""
    settings = {f"pretraining_{name}": value for name, value in pretraining._asdict().items()}
    tasks = [[list(digits), change.__name__] for digits, change in TASKS]
    return {"tasks": tasks, "shots": SHOTS, "steps": steps, **settings, **MODEL}
