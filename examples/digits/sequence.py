"""One run of ``examples.continual``: a sequence of tasks, learned by one method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import rift_kernels as rk

from .data import SHOTS, TASKS, Task, draw_tasks
from .evaluation import accuracy, refitted_accuracy
from .methods import MEASURES, PROBE, Plan
from .model import SIZES, Transformer
from .runs import Run
from .training import PRETRAINING, Recipe, finetune, pretrain


class Start(NamedTuple):
    """The tasks, and the model after the first of them, which all methods of a seed share."""

    seed: int
    tasks: list[Task]
    model: Transformer


def prepare(seed: int, recipe: Recipe = PRETRAINING) -> Start:
    tasks = draw_tasks(seed, torch.device("cpu"))
    return Start(seed, tasks, pretrain(tasks[0].training, len(TASKS[0][0]), seed, recipe))


def perform(start: Start, plan: Plan, steps: int) -> Run:
    """Learn all tasks; the loss compares with the frozen model after the previous task.

    ``accuracy[i][j]`` in the result is that of task j after task i, with task j's own head.
    ``refitted[i][j]`` is that of a linear classifier fitted to the features after task i.
    """
    seed, tasks, model = start
    rift = rk.RIFTLoss(plan.method, weight=plan.weight) if plan.method in MEASURES else None
    recipe = Recipe(steps, plan.rate)
    heads: list[nn.Linear] = []
    results: Run = {"accuracy": [], "refitted": []}
    for i, task in enumerate(tasks):
        if i:
            teacher, frozen = model.requires_grad_(False), plan.method == PROBE
            classes = len(TASKS[i][0])
            arguments = (teacher, task.training, classes, rift, seed, recipe)
            model, _ = finetune(*arguments, frozen=frozen)
        heads.append(model.head)
        learned = list(zip(tasks, heads, strict=False))
        results["accuracy"].append([accuracy(model, past.test, head) for past, head in learned])
        results["refitted"].append([refitted_accuracy(model, *past) for past, _ in learned])
    return results


def average(accuracies: list[list[float]]) -> float:
    """Mean accuracy over all tasks after the last."""
    return sum(accuracies[-1]) / len(accuracies[-1])


def forgetting(accuracies: list[list[float]]) -> float:
    """Best earlier accuracy minus the accuracy after the last task, averaged over earlier tasks."""
    last = len(accuracies) - 1
    losses = [
        max(accuracies[i][j] for i in range(j, last)) - accuracies[last][j] for j in range(last)
    ]
    return sum(losses) / last


def shared_settings(pretraining: Recipe, steps: int) -> Run:
    """The settings that no plan varies."""
    settings = {f"pretraining_{name}": value for name, value in pretraining._asdict().items()}
    tasks = [[list(digits), transform.__name__] for digits, transform in TASKS]
    return {"tasks": tasks, "shots": SHOTS, "steps": steps, **settings, **SIZES}
