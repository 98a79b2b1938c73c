"""``python -m benchmarks.step``: what RIFT costs in a finetuning step, in time and memory.

Steps (forward, loss, backward, optimiser) take turns: plain, with the teacher's forward pass, and
with :class:`~rift_kernels.RIFTRegularizer`, whose loss is by naive code and by every backend. Once
all weights are trained, and once adapters, where the teacher is the student without them. Each loss
alone takes its turn in the same rounds. On a CPU, shares are of CPU time. ``--profile full`` trains
adapters of a ViT-B/16 and takes ten minutes. Exits with 1 if rift_kernels failed or was wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rift_kernels as rk
from rift_kernels.dispatch import availability
from rift_kernels.features import hooks
from rift_kernels.features.pooling import pool

from . import command, environment, measure, schema, step_table
from .command import Job
from .measure import CPU_TIME, Call, Task, added, kept_memory, peak_memory, quantiles
from .models import PACKAGES, Finetuning, Profile, operations
from .oracle import Oracle, wrong
from .providers import NAIVE, OURS, WIDE, Provider, providers
from .run import finite, sentence
from .schema import LossAlone, StepWay
from .step_table import ADAPTERS_OFF, COPY
from .workloads import BFLOAT16, Inputs, Workload, dtype_name


@dataclass(frozen=True)
class Suite:
    """What is finetuned in turn, and the width of the product at its peak."""

    profiles: tuple[Profile, ...]
    probe: int

    @property
    def budget(self) -> float:
        return sum(profile.budget for profile in self.profiles)


_SMALL = Profile(64, 8, 192, 4, 3, 100, batch=16, budget=40)
_VIT_B_16 = Profile(224, 16, 768, 12, 12, 100, batch=8, budget=600, rank=8)
_GPU = replace(_VIT_B_16, classes=1000, batch=64, budget=30, autocast=True)
# Without a budget: as few rounds as there may be.
_SMOKE = Profile(16, 4, 16, 2, 2, 4, batch=8, budget=0)
PROFILES = {
    "cpu": Suite((_SMALL, replace(_VIT_B_16, image=128, depth=2, budget=40)), probe=2048),
    "full": Suite((_SMALL, _VIT_B_16), probe=2048),
    "gpu": Suite((replace(_GPU, rank=None), _GPU), probe=8192),
    "smoke": Suite((_SMOKE, replace(_SMOKE, rank=8)), probe=64),
}


class Loss(NamedTuple):
    """Who compares which features."""

    provider: Provider
    pooling: str
    features: Workload

    def __str__(self) -> str:
        rows = "class tokens" if self.pooling == "cls" else "tokens"
        return f"{self.provider.name}, {rows}, {self.features.shape}"

    def task(self, students: Any, teachers: Any) -> Task:
        """The computation on the rows of a layer, or of each."""
        sides = ([x] if isinstance(x, Tensor) else x for x in (students, teachers))
        students, teachers = ([x.to(self.features.dtype) for x in side] for side in sides)
        return Task(self.provider, self.features.measure, Inputs(students, teachers))

    def distances(self, students: Any, teachers: Any, _mask: None) -> Tensor:
        return 1 - self.task(students, teachers).forward()


def losses(profile: Profile, device: torch.device) -> tuple[list[Loss], list[Provider]]:
    """All losses, and those of our backends that cannot run here.

    Class tokens of all layers are few rows that need debiasing. The last layer's tokens are
    compared biased: debiasing would change little, and naive code is cheapest so.
    """
    candidates = {p.name: p for p in providers(device, compiled=())}
    naive, wide, autocast = candidates[NAIVE], candidates[WIDE], profile.autocast
    if autocast:
        # It multiplies float32 features in bfloat16, unless it is kept out.
        naive = replace(naive, products_in=BFLOAT16)
        wide = replace(wide, settings=partial(torch.autocast, device.type, enabled=False))
    ours = [candidates[OURS + backend] for backend in availability.BACKENDS]
    tokens = Workload("cka_biased", profile.batch * profile.tokens, profile.width)
    class_tokens = Workload("cka_debiased", profile.batch, profile.width, layers=profile.depth)
    features = [("cls", class_tokens), ("tokens", tokens)]
    # Autocast leaves the states in float32; code that casts them first reads and multiplies less.
    features += [("tokens", replace(tokens, dtype=BFLOAT16))] if autocast else []
    compared = []
    for pooling, workload in features:
        every = [naive, *([wide] if autocast and workload.dtype == torch.float32 else [])]
        every += [provider for provider in ours if provider.can_do(workload)]
        compared += [Loss(provider, pooling, workload) for provider in every]
    return compared, [provider for provider in ours if provider.reason]


@dataclass(eq=False)
class Step:
    """A step in the two phases that are timed: plain, with a teacher's pass, or with a loss."""

    finetuning: Finetuning
    teacher: str | None = None
    loss: Loss | None = None
    first_layer: bool = False  # is the only one that is compared, so that the teacher ends there

    def __post_init__(self) -> None:
        self.backward = self.finetuning.backward
        self.student, depth = self.finetuning.student(), self.finetuning.profile.depth
        self._models = [self.student]
        if self.teacher:
            frozen = self.finetuning.frozen_copy() if self.teacher == COPY else None
            self._models += [frozen] if frozen else []
            pooling = self.loss.pooling if self.loss else "tokens"
            first = 0 if pooling == "cls" or self.first_layer else depth - 1
            last = 0 if self.first_layer else depth - 1
            layers = [f"*layer*.{i}" for i in range(first, last + 1)]
            rift: Any = rk.RIFTRegularizer(self.student, frozen, layers=layers, pooling=pooling)
            self.rift = rift
            if self.loss:
                rift.loss.distances = self.loss.distances

    def __str__(self) -> str:
        teacher = "teacher's first layer" if self.first_layer else "teacher"
        return str(self.loss or (teacher if self.teacher else "plain"))

    @property
    def weights(self) -> int:
        """Bytes of all models."""
        tensors = {id(p): p.nbytes for model in self._models for p in model.parameters()}
        return sum(tensors.values())

    def forward(self) -> Tensor:
        with self.finetuning.autocast():
            loss = self.finetuning.task_loss(self.student)
            if self.loss:
                loss = loss + self.rift()
            elif self.teacher:
                self.teacher_pass()
                self.rift._student.clear()
        return loss

    def teacher_pass(self) -> Any:
        """The teacher's features: what the regularizer does before it compares."""
        with self.finetuning.autocast():
            call = hooks.Call((), {"pixel_values": self.finetuning.images})
            rift = self.rift
            teacher, student = rift._teacher, rift._student
            features = teacher.features(call, student, rift.layers, {}, rift._warnings)
        return list(features.values())

    def outputs(self) -> list[Tensor]:
        """The student's outputs of the compared layers, all tokens, as leaves."""
        with torch.no_grad(), self.finetuning.autocast():
            self.student(pixel_values=self.finetuning.images)
        outputs = self.rift._student.outputs().values()
        leaves = [output.clone().requires_grad_() for output in outputs]
        self.rift._student.clear()
        return leaves


def described(step: Step, device: torch.device) -> StepWay:
    """What a step costs but for its time, or why it fails."""
    loss = step.loss and str(step.loss)
    way = StepWay(
        teacher=step.teacher, loss=loss, first_layer=step.first_layer, weights=step.weights
    )
    try:
        step.backward(step.forward())
        way.memory = peak_memory(step, device)
    except Exception as error:
        if step.loss is None:
            raise
        # A loss that fails is no reason to lose the others.
        way.reason = sentence(error)
    return way


def loss_alone(step: Step, loss: Loss, way: StepWay, device: torch.device) -> Call:
    """The loss on outputs that a step caught, to be timed; its error and its memory are noted.

    It picks its rows from all tokens, and their gradient is one of all tokens.
    """
    outputs, teachers = step.outputs(), step.teacher_pass()

    def rows_of(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [pool("", tensor, loss.pooling, None) for tensor in tensors]

    def forward() -> Tensor:
        with step.finetuning.autocast():
            return loss.task(rows_of(outputs), teachers).forward()

    call = Call(forward, lambda values: torch.autograd.grad(values.sum(), outputs))
    values, inputs = forward(), loss.task(rows_of(outputs), teachers).inputs
    gradients = rows_of(torch.autograd.grad(values.sum(), outputs))
    _, error = Oracle(loss.features, inputs).errors(values, tuple(gradients))
    del values, gradients
    way.gradient_error, way.wrong = finite(error), wrong(0.0, error)
    way.alone = LossAlone(peak_memory(call, device), kept_memory(forward, device))
    return call


def measured(
    profile: Profile, peaks: Mapping[str, float], device: torch.device, seconds: float
) -> schema.Finetuning:
    """All steps of one finetuning. The plain step is timed twice: the noise."""
    end, finetuning = time.monotonic() + seconds, Finetuning(profile, device)
    compared, unable = losses(profile, device)
    teacher = ADAPTERS_OFF if profile.rank else COPY
    plain, base = Step(finetuning), Step(finetuning, teacher)
    timed = [plain, base, *(Step(finetuning, teacher, loss) for loss in compared)]
    timed.append(Step(finetuning, teacher, first_layer=True))
    # The cost of a second copy of the weights is its memory.
    others = [Step(finetuning, COPY, compared[0])] if profile.rank else []
    ways = [described(step, device) for step in (*timed, *others)]
    tasks: dict[str, measure.Timed] = {"again": plain}
    for step, way in zip(timed, ways, strict=False):
        if way.reason is None:
            tasks[str(step)] = step
            if step.loss:
                tasks[f"{step} alone"] = loss_alone(step, step.loss, way, device)
    samples = measure.time_rounds(tasks, device, end, max_rounds=100)
    whole, clock = samples[str(plain)], CPU_TIME if device.type == "cpu" else "both"
    forward, both = operations(plain)
    predicted = both / peaks["bfloat16" if profile.autocast else "float32"]
    for step, way in zip(timed, ways, strict=False):
        if step.loss:
            seconds_alone = step.loss.provider.predicted(step.loss.features, peaks)
            way.predicted_share = (seconds_alone or 0.0) / predicted
        if step.teacher and way.reason is None:
            rounds = samples[str(step)]
            way.adds = added(rounds, whole, whole, clock)
        if way.alone:
            alone = samples[f"{step} alone"]
            way.loss_adds = added(rounds, samples[str(base)], whole, clock)
            way.alone.seconds, way.alone.share = quantiles(alone), added(alone, None, whole, clock)
        way.seconds = quantiles(samples.get(str(step), []))
    ways[1].predicted_share = forward / both
    ways[len(timed) - 1].predicted_share = forward / both / profile.depth
    return schema.Finetuning(
        model=finetuning.description(),
        predicted_seconds=predicted,
        rounds=len(whole),
        clock=clock,
        noise={c: measure.noise(whole, samples["again"], c) for c in measure.CLOCKS},
        teacher_memory=peak_memory(Call(base.teacher_pass), device)["both"],
        ways=ways,
        unable=[schema.Provider(p.name, p.reason) for p in unable],
    )


def run(job: Job[Suite]) -> schema.Step:
    """Measure the finetunings in about the budget, divided among them as their profiles ask."""
    suite, device = job.profile, job.device
    dtypes = (torch.float32, BFLOAT16)[: 1 + suite.profiles[0].autocast]
    peaks = {dtype_name(d): measure.matmul_peak(d, suite.probe, device) for d in dtypes}
    scale = job.budget / (suite.budget or 1.0)
    result = schema.Step(
        profile=job.name,
        environment=environment.describe(device),
        peaks={"matmul_flops": peaks},
        finetunings=[
            measured(profile, peaks, device, scale * profile.budget)
            for profile in command.progress(suite.profiles)
        ],
    )
    result.environment.versions |= {name: metadata.version(name) for name in PACKAGES}
    return result


def failures(result: schema.Step) -> Iterator[str]:
    """The steps in which ours failed or was wrong."""
    for way in (way for finetuning in result.finetunings for way in finetuning.ways):
        if str(way.loss).startswith(OURS) and (way.reason or way.wrong):
            yield f"{way.loss}: {way.reason or 'wrong'}"


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("step", __doc__, PROFILES, arguments)
    result = run(job)
    return command.finish(result, out, step_table.summary(result), failures(result))


if __name__ == "__main__":
    sys.exit(main())
