"""``python -m benchmarks.lora``: what RIFT costs in a LoRA finetuning step, in time and memory.

Steps of transformers' ViT with adapters by peft: plain, with the teacher's forward pass, and with
:class:`~rift_kernels.RIFTRegularizer`, whose teacher is the student without its adapters. A copy as
teacher is not timed: its cost is its memory. The loss alone takes its turn in the same rounds. On a
CPU, shares are of CPU time. ``--profile full`` is a ViT-B/16 and takes ten minutes on a CPU.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import rift_kernels as rk

from . import command, environment, flops, measure, schema, step_table
from .command import Job
from .measure import CPU_TIME, Call, added, kept_memory, peak_memory, quantiles, quantiles_of
from .models import SMOKE, VIT_B_16, Finetuning, Profile, operations
from .step_table import ADAPTERS_OFF
from .workloads import Workload

RANK, COPY, PACKAGES = 8, "a copy", ("transformers", "peft")
# Query, key, value and output of an attention, as transformers 5 and 4 call them.
_TARGETS = r".*\.(?:[qkvo]_proj|query|key|value|attention\.output\.dense)"
_FULL = replace(VIT_B_16, classes=100, batch=8, budget=600, autocast=False)
PROFILES = {
    "cpu": replace(_FULL, image=128, depth=2, budget=28),
    "full": _FULL,
    "gpu": replace(_FULL, batch=64, budget=60, autocast=True),
    "smoke": SMOKE,
}


def adapted_vit(profile: Profile, device: torch.device) -> Finetuning:
    """A ViT with random weights, of which low-rank adapters and the head are trained."""
    try:
        import peft
        import transformers
    except ImportError as error:
        raise SystemExit(
            f"benchmarks.lora needs {' and '.join(PACKAGES)}: pip install '.[bench]' ({error})"
        ) from error

    torch.manual_seed(0)
    config: Any = transformers.ViTConfig(
        image_size=profile.image,
        patch_size=profile.patch,
        hidden_size=profile.width,
        num_hidden_layers=profile.depth,
        num_attention_heads=profile.heads,
        intermediate_size=4 * profile.width,
    )
    config.num_labels = profile.classes
    base = transformers.ViTForImageClassification(config)
    # Adapters begin at zero, where student and teacher agree and the loss has no gradient.
    adapters = peft.LoraConfig(r=RANK, target_modules=_TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(base, adapters)
    base.classifier.requires_grad_()
    return Finetuning(model.to(device), profile, device)


@dataclass
class Step:
    """A step in the two phases that are timed: plain, with a teacher's pass, or with RIFT."""

    adapted: Finetuning
    teacher: str | None = None
    pooling: str | None = None

    def __post_init__(self) -> None:
        model, self.backward = self.adapted.model, self.adapted.backward
        # Steps share weights, but each has modules of its own, without another's hooks.
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.student: Any = copy.deepcopy(model, shared).train()
        if self.teacher:
            teacher = copy.deepcopy(model).unload() if self.teacher == COPY else None
            layer, pooling = f"*layer*.{self.adapted.profile.depth - 1}", self.pooling or "tokens"
            self.rift = rk.RIFTRegularizer(self.student, teacher, layers=layer, pooling=pooling)

    def forward(self) -> Tensor:
        images, labels = self.adapted.images, self.adapted.labels
        with self.adapted.autocast():
            loss = cross_entropy(self.student(pixel_values=images).logits, labels)
            if self.pooling:
                loss = loss + self.rift(pixel_values=images)
            elif self.teacher:
                self.teacher_pass()
                self.rift._student.clear()
        return loss

    def teacher_pass(self) -> Tensor:
        """What the regularizer does before it compares."""
        with self.adapted.autocast():
            (features,) = self.rift._teachers((), {"pixel_values": self.adapted.images}, None)
        return features


def loss_alone(adapted: Finetuning, pooling: str) -> Call:
    """The loss by itself, on the states of the last layer, down to their gradient."""
    step, loss, profile = Step(adapted, ADAPTERS_OFF), rk.RIFTLoss(), adapted.profile
    with torch.no_grad(), adapted.autocast():
        step.student(pixel_values=adapted.images)
        (states,) = step.rift._student.features().values()
    # The regularizer picks its rows from all tokens, and their gradient is one of all tokens.
    shape = profile.batch, profile.tokens, profile.width
    x, y = states.view(shape).requires_grad_(), step.teacher_pass().view(shape)

    def forward() -> Tensor:
        rows = (t[:, 0] if pooling == "cls" else t.flatten(0, 1) for t in (x, y))
        with adapted.autocast():
            return loss(*rows)

    return Call(forward, lambda value: torch.autograd.grad(value, x))


def run(job: Job[Profile]) -> schema.Lora:
    """Measure all steps in about the budget. The plain step is timed twice: the noise."""
    end = time.monotonic() + job.budget
    profile, device = job.profile, job.device
    adapted = adapted_vit(profile, device)
    plain, base = Step(adapted), Step(adapted, ADAPTERS_OFF)
    # A loss alone follows a step, which leaves it the caches.
    tasks: dict[str, measure.Timed] = {
        "plain": plain,
        "cls": loss_alone(adapted, "cls"),
        "teacher": base,
        "tokens": loss_alone(adapted, "tokens"),
        "RIFT cls": Step(adapted, ADAPTERS_OFF, "cls"),
        "RIFT tokens": Step(adapted, ADAPTERS_OFF, "tokens"),
        "copy": Step(adapted, COPY, "cls"),
    }
    _, products = operations(plain)
    for task in tasks.values():
        task.backward(task.forward())
    timed = {name: task for name, task in tasks.items() if name != "copy"} | {"again": plain}
    samples = measure.time_rounds(timed, device, end, max_rounds=100)
    whole, again = samples["plain"], samples["again"]
    clock = CPU_TIME if device.type == "cpu" else "both"
    cpu = {name: quantiles_of([s[CPU_TIME] for s in rounds]) for name, rounds in samples.items()}
    weights = list(adapted.model.parameters())
    result = schema.Lora(
        profile=job.name,
        environment=environment.describe(device),
        model=profile.model(weights, RANK),
        rounds=len(whole),
        clock=clock,
        noise={c: measure.noise(whole, again, c) for c in again[0]},
        ways=[],
        teacher_memory=peak_memory(Call(base.teacher_pass), device)["both"],
        losses=[],
    )
    result.environment.versions |= {name: metadata.version(name) for name in PACKAGES}
    result.model.trained = sum(weight.numel() for weight in adapted.weights)
    for name, task in tasks.items():
        memory, rounds = peak_memory(task, device), samples.get(name, [])
        if isinstance(task, Step):
            teacher, pooling = task.teacher, task.pooling
            new: Any = partial(Step, adapted, teacher, pooling)
            kept = sum(weight.nbytes for weight in weights) + kept_memory(new, device)
            way = schema.LoraWay(teacher=teacher, pooling=pooling, weights=kept, memory=memory)
            result.ways.append(way)
            if rounds:
                way.seconds, way.cpu_seconds = quantiles(rounds), cpu[name]
                way.adds = added(rounds, whole, whole, clock) if teacher else None
            if rounds and pooling:
                way.loss_adds = added(rounds, samples["teacher"], whole, clock)
        else:
            rows = profile.batch * (1 if name == "cls" else profile.tokens)
            workload = Workload("cka_debiased", rows, profile.width)
            loss = schema.LoraLoss(
                pooling=name,
                features=workload.shape,
                predicted_share=(flops.rift_kernels(workload) or 0.0) / products,
                seconds=quantiles(rounds),
                cpu_seconds=cpu[name],
                share=added(rounds, None, whole, clock),
                memory=memory,
                kept=kept_memory(task.forward, device),
            )
            result.losses.append(loss)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("lora", __doc__, PROFILES, arguments)
    result = run(job)
    return command.finish(result, out, step_table.lora_summary(result), ())


if __name__ == "__main__":
    sys.exit(main())
