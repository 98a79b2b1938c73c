"""``python -m benchmarks.step``: what a finetuning step costs with the loss, and without.

Steps of a vision transformer (forward, loss, backward, optimiser) take turns: plain, and with a
loss by naive code and by every backend of rift_kernels, each with the teacher's features from a
cache and with its forward pass. Exits with 1 if rift_kernels failed or was wrong.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rift_kernels.dispatch import availability

from . import command, environment, measure, schema, step_table
from .command import Job
from .models import SMOKE, VIT_B_16, Finetuning, Profile, ViT, operations
from .oracle import Oracle, wrong
from .providers import NAIVE, OURS, WIDE, Provider, providers
from .run import finite, sentence
from .schema import LeftOut, StepWay
from .workloads import Inputs, Workload, dtype_name

PROFILES = {
    "cpu": Profile(64, 8, 192, 4, 3, 100, batch=16, budget=40, probe=2048),
    "gpu": VIT_B_16,
    "smoke": SMOKE,
}


def features_of(profile: Profile) -> list[Workload]:
    """Class tokens of all layers, few rows that need debiasing, and the last layer's tokens.

    These are compared biased: debiasing would change little, and naive code is cheapest so.
    """
    rows, width = profile.batch * profile.tokens, profile.width
    tokens = [Workload("cka_biased", rows, width, d) for d in (torch.float32, torch.bfloat16)]
    class_tokens = Workload("cka_debiased", profile.batch, width, layers=profile.depth)
    # Autocast leaves the states in float32; code that casts them first reads and multiplies less.
    return [class_tokens, *tokens[: 1 + profile.autocast]]


def pick(features: Workload, states: list[Tensor]) -> list[Tensor]:
    """The features among the states after every layer."""
    if features.measure == "cka_biased":
        return [states[-1].flatten(0, 1).to(features.dtype)]
    return [state[:, 0].to(features.dtype) for state in states]


class Student(Finetuning):
    """A student near its frozen teacher, trained in full."""

    def __init__(self, profile: Profile, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self._teacher = ViT(profile).requires_grad_(False)
        # Already finetuned a little: where student and teacher agree, the loss has no gradient.
        student = copy.deepcopy(self._teacher)
        for parameter in student.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        super().__init__(student.requires_grad_(), profile, device)

    @torch.no_grad()
    def teachers(self, features: Workload | None) -> list[Tensor]:
        """The teacher's features: a forward pass that leaves nothing else in memory."""
        with self.autocast():
            states = self._teacher(self.images)
            # A slice would keep all tokens.
            return [x.contiguous() for x in pick(features, states)] if features else []

    def gradient_error(self, provider: Provider, features: Workload) -> float:
        """The error of a loss's gradient at the student's features, relative, against float64."""
        with self.autocast():
            with torch.no_grad():
                students = pick(features, self.model(self.images))
            students = [x.clone().requires_grad_() for x in students]
            inputs = Inputs(students, self.teachers(features))
            task = measure.Task(provider, features.measure, inputs)
            values = task.forward()
        return Oracle(features, inputs).errors(values, task.backward(values))[1]


@dataclass
class Step:
    """A step in the two phases that are timed: what computes a loss, if any, of which features."""

    student: Student
    provider: Provider | None = None
    features: Workload | None = None
    teacher_runs: bool = False

    def __post_init__(self) -> None:
        self.backward = self.student.backward
        self._cached = [] if self.teacher_runs else self.student.teachers(self.features)

    def forward(self) -> Tensor:
        """The passes of the teacher, if it runs, and of the student; the mean of 1 - CKA."""
        student, features = self.student, self.features
        teachers = student.teachers(features) if self.teacher_runs else self._cached
        with student.autocast():
            states = student.model(student.images)
            loss = cross_entropy(student.model.head(states[-1][:, 0]), student.labels)
            if self.provider and features:
                inputs = Inputs(pick(features, states), teachers)
                values = measure.Task(self.provider, features.measure, inputs).forward()
                loss = loss + (1 - values).mean()
        return loss


def plan(student: Student, device: torch.device) -> tuple[list[Step], list[LeftOut]]:
    """All steps, and the losses that are left out, with the reasons."""
    candidates = {p.name: p for p in providers(device, compiled=())}
    naive, wide, autocast = candidates[NAIVE], candidates[WIDE], student.profile.autocast
    if autocast:
        # It multiplies float32 features in bfloat16, unless it is kept out.
        naive = replace(naive, products_in=torch.bfloat16)
        wide = replace(wide, settings=partial(torch.autocast, device.type, enabled=False))
    ours = [candidates[OURS + backend] for backend in availability.BACKENDS]
    steps = [Step(student), Step(student, teacher_runs=True)]
    for w in features_of(student.profile):
        losses = [naive, wide] if autocast and w.dtype == torch.float32 else [naive]
        losses += [provider for provider in ours if provider.can_do(w)]
        steps += [Step(student, provider, w, runs) for provider in losses for runs in (False, True)]
    return steps, [LeftOut(p.name, None, p.reason) for p in ours if p.reason]


def predict(step: Step, count: tuple[int, int], peaks: Mapping[str, float]) -> StepWay:
    """A step that is yet to be measured: all its products, each at the peak of its dtype."""
    peak = peaks["bfloat16" if step.student.profile.autocast else "float32"]
    seconds = (count[1] + count[0] * step.teacher_runs) / peak
    loss = features = None
    if step.provider and step.features:
        rows = "tokens" if step.features.measure == "cka_biased" else "class tokens"
        loss, features = step.provider.name, f"{rows}, {step.features.shape}"
        seconds += step.provider.predicted(step.features, peaks) or 0.0
    return StepWay(
        loss=loss,
        features=features,
        teacher_runs=step.teacher_runs,
        predicted_seconds=seconds,
    )


def run(job: Job[Profile]) -> schema.Step:
    """Measure all steps in about the budget. The plain step is timed twice: the noise."""
    end = time.monotonic() + job.budget
    profile, device = job.profile, job.device
    student = Student(profile, device)
    steps, left_out = plan(student, device)
    count = operations(steps[0])
    dtypes = (torch.float32, torch.bfloat16)[: 1 + profile.autocast]
    peaks = {dtype_name(d): measure.matmul_peak(d, profile.probe, device) for d in dtypes}
    ways = [predict(step, count, peaks) for step in steps]
    tasks: dict[str, measure.Timed] = {"again": steps[0]}
    for step, way in zip(steps, ways, strict=True):
        try:
            step.backward(step.forward())
            way.memory = measure.peak_memory(step, device)
            if step.provider and step.features:
                error = student.gradient_error(step.provider, step.features)
                way.gradient_error, way.wrong = finite(error), wrong(0.0, error)
            tasks[step_table.title(way)] = step
        except Exception as error:
            # A loss that fails is no reason to lose the others.
            way.reason = sentence(error)
    samples = measure.time_rounds(tasks, device, end, max_rounds=100)
    plain, again = samples["plain step"], samples["again"]
    for way in (way for way in ways if way.reason is None):
        way.seconds = measure.quantiles(samples[step_table.title(way)])
    return schema.Step(
        profile=job.name,
        environment=environment.describe(device),
        peaks={"matmul_flops": peaks},
        model=profile.model(student.weights),
        rounds=len(plain),
        noise={c: measure.noise(plain, again, c) for c in measure.CLOCKS},
        ways=ways,
        left_out=left_out,
    )


def failures(result: schema.Step) -> list[str]:
    """The steps in which ours failed or was wrong."""
    ours = [way for way in result.ways if str(way.loss).startswith(OURS)]
    failed = [way for way in ours if way.reason or way.wrong]
    return [f"{way.loss}: {way.features}: {way.reason or 'wrong'}" for way in failed]


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("step", __doc__, PROFILES, arguments)
    result = run(job)
    return command.finish(result, out, step_table.summary(result), failures(result))


if __name__ == "__main__":
    sys.exit(main())
