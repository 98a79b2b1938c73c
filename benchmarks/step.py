"""``python -m benchmarks.step``: what a finetuning step costs with the loss, and without.

A step of a vision transformer, forward, loss, backward and optimiser: plain, with the teacher's
forward pass, with a loss on the teacher's cached features, and with both; the loss by naive code
and by every backend of rift_kernels that can run. All are timed in interleaved rounds of one run.
The predictions are printed before anything is measured. Exits with 1 if rift_kernels failed or was
wrong, or nothing was measured.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from rift_kernels.dispatch import availability
from rift_kernels.dispatch.plan import use_gram

from . import command, environment, measure, schema, step_table
from .command import Job
from .finetuning import CLASS_TOKENS, TOKENS, Features, Finetuning, Profile, Step, Way
from .oracle import wrong
from .providers import NAIVE, OURS, WIDE, Provider, providers
from .run import finite, sentence
from .schema import LeftOut, StepWay
from .vit import SMOKE, VIT_B_16, Size, ViT
from .workloads import dtype_name

PLAIN, AGAIN = Way(), "plain step again"


_FLOAT32 = (Features(CLASS_TOKENS, torch.float32), Features(TOKENS, torch.float32))
# Autocast leaves the states in float32; code that casts them first reads and multiplies less.
_CAST = (*_FLOAT32, Features(TOKENS, torch.bfloat16))

PROFILES = {
    "cpu": Profile(Size(64, 8, 192, 4, 3, 100), 16, 40, features=_FLOAT32, probe=2048),
    "gpu": Profile(VIT_B_16, 64, 90, autocast=True, features=_CAST, probe=8192),
    "smoke": Profile(SMOKE, 8, 5, max_rounds=5, features=_FLOAT32, probe=64),
}


def model_flops(size: Size, batch: int) -> tuple[int, int]:
    """Operations of the products, forward, and with the backward; counted, not computed."""
    with torch.device("meta"):
        model = ViT(size)
        images = torch.empty(batch, 3, size.image, size.image)
        labels = torch.empty(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = cross_entropy(model.logits(model(images)), labels)
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def plan(
    profile: Profile, device: torch.device, candidates: Sequence[Provider]
) -> tuple[list[Way], list[LeftOut]]:
    """All ways, and the losses that are left out, with the reasons."""
    ways = [PLAIN, Way(teacher_runs=True)]
    ours = [p for p in candidates if p.name.startswith(OURS)]
    left_out = [LeftOut(p.name, None, p.reason) for p in ours if p.reason]
    for features in profile.features:
        # Autocast multiplies float32 features in bfloat16.
        cast = profile.autocast and features.dtype == torch.float32
        losses = [NAIVE, WIDE] if cast else [NAIVE]
        w = features.workload(profile.size, profile.batch)
        gram = use_gram("cka", w.rows, w.width, w.width)
        problem = availability.Problem("cka", (gram,) * w.layers, w.rows, w.width)
        for name in (p.name for p in ours if not p.reason):
            backend = name.removeprefix(OURS)
            reason = availability.reason_against(backend, device, [w.dtype], problem)
            if reason is None:
                losses.append(name)
            else:
                label = features.label(profile.size, profile.batch)
                left_out.append(LeftOut(name, label, reason))
        ways += [Way(name, features, runs) for name in losses for runs in (False, True)]
    return ways, left_out


def predicted(
    way: Way,
    profile: Profile,
    count: tuple[int, int],
    candidates: Sequence[Provider],
    peaks: Mapping[str, float],
) -> float:
    """Seconds of the products of the model, the teacher and the loss, each at its dtype's peak."""
    forward, both = count
    peak = peaks["bfloat16" if profile.autocast else "float32"]
    seconds = (both + (forward if way.teacher_runs else 0)) / peak
    if way.loss and way.features:
        (provider,) = (p for p in candidates if p.name == way.loss)
        workload = way.features.workload(profile.size, profile.batch)
        if way.loss == NAIVE and profile.autocast:
            provider = dataclasses.replace(provider, products_in=torch.bfloat16)
        seconds += provider.predicted(workload, peaks) or 0.0
    return seconds


def run(job: Job[Profile], candidates: Sequence[Provider]) -> schema.Step:
    """Measure all ways in about the budget."""
    end = time.monotonic() + job.budget
    profile, device = job.profile, job.device
    dtypes = {torch.float32, *(f.dtype for f in profile.features)}
    dtypes |= {torch.bfloat16} if profile.autocast else set()
    peaks = {dtype_name(d): measure.matmul_peak(d, profile.probe, device) for d in dtypes}
    count = model_flops(profile.size, profile.batch)
    ways, left_out = plan(profile, device, candidates)
    finetuning = Finetuning(profile.size, profile.batch, profile.autocast, device)
    result = schema.Step(
        profile=job.name,
        environment=environment.describe(device),
        peaks={"matmul_flops": peaks},
        model=profile.model(finetuning.optimiser.weights),
        ways=[
            StepWay(
                loss=way.loss,
                features=way.features.label(profile.size, profile.batch) if way.features else None,
                teacher_runs=way.teacher_runs,
                predicted_seconds=predicted(way, profile, count, candidates, peaks),
            )
            for way in ways
        ],
        left_out=left_out,
    )
    print(step_table.predictions(result), flush=True)
    _complete(result, ways, finetuning, job, end)
    return result


def _complete(
    result: schema.Step,
    ways: Sequence[Way],
    finetuning: Finetuning,
    job: Job[Profile],
    end: float,
) -> None:
    """Check all ways, time those that run, and write what was found into the result.

    The plain step is timed twice, which gives the noise.
    """
    tasks: dict[str, measure.Timed] = {}
    entries = dict(zip(map(str, ways), result.ways, strict=True))
    for way in ways:
        try:
            tasks[str(way)] = _examined(way, entries[str(way)], finetuning, job.device)
        except Exception as error:
            # A way that fails is no reason to lose the others.
            entries[str(way)].reason = sentence(error)
    if str(PLAIN) not in tasks:
        return
    tasks[AGAIN] = tasks[str(PLAIN)]
    samples = measure.time_rounds(tasks, job.device, end, job.profile.max_rounds)
    again = samples.pop(AGAIN)
    for name, rounds in samples.items():
        entries[name].seconds = measure.quantiles(rounds)
    result.rounds = len(again)
    result.noise = {c: measure.noise(samples[str(PLAIN)], again, c) for c in measure.CLOCKS}


def _examined(way: Way, entry: StepWay, finetuning: Finetuning, device: torch.device) -> Step:
    """A way's step, warm; its entry gets its memory, and how right its loss is."""
    step = Step(finetuning, way)
    step.backward(step.forward())
    entry.memory = measure.peak_memory(step, device)
    if way.loss and way.features:
        error = finetuning.gradient_error(way.loss, way.features)
        entry.gradient_error, entry.wrong = finite(error), wrong(0.0, error)
    return step


def failures(ways: Sequence[StepWay]) -> list[str]:
    """The ways in which ours failed or was wrong."""
    lines = [] if any(way.seconds for way in ways) else ["nothing was measured"]
    for way in ways:
        if (way.loss or "").startswith(OURS) and (way.reason or way.wrong):
            lines.append(f"{way.loss}: {way.features}: {way.reason or 'wrong'}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("step", __doc__, PROFILES, arguments)
    result = run(job, providers(job.device, compiled=()))
    return command.finish(result, out, step_table.summary(result), failures(result.ways))


if __name__ == "__main__":
    sys.exit(main())
