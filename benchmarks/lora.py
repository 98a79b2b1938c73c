"""``python -m benchmarks.lora``: what RIFT costs in a LoRA finetuning step, in time and memory.

A step of transformers' ViT with adapters by peft: plain, with the teacher's forward pass alone, and
with :class:`~rift_kernels.RIFTRegularizer`. Its teacher is the student without its adapters, or a
copy, whose cost is its memory. All but the copy are timed in interleaved rounds of one run, and so
is the loss alone. On a CPU, shares are of CPU time, which other processes do not lengthen.
``--profile full`` is a ViT-B/16 (ten minutes on a CPU); ``cpu``, a part of ``make bench``, has two
of its layers and smaller images. Exits with 1 if a step with RIFT needs more memory than its parts.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import adapted, command, environment, flops, measure, schema, step_table
from .adapted import ADAPTERS_OFF, COPY, Adapted, LossAlone, Step, TeacherPass, Way
from .command import Job
from .finetuning import Profile
from .schema import LoraLoss, LoraWay
from .vit import SMOKE, VIT_B_16
from .workloads import Workload

PLAIN, TEACHER, AGAIN = Way(), Way(ADAPTERS_OFF), "plain step again"
POOLINGS = ("cls", "tokens")
WAYS = (PLAIN, TEACHER, *(Way(ADAPTERS_OFF, pooling) for pooling in POOLINGS), Way(COPY, "cls"))
Samples = Mapping[str, list[measure.Seconds]]


_VIT_B = dataclasses.replace(VIT_B_16, classes=100)

PROFILES = {
    "cpu": Profile(dataclasses.replace(_VIT_B, image=128, depth=2), 8, 28),
    "full": Profile(_VIT_B, 8, 600),
    "gpu": Profile(_VIT_B, 64, 60, autocast=True),
    "smoke": Profile(SMOKE, 8, 5, max_rounds=5),
}


def run(job: Job[Profile]) -> schema.Lora:
    """Measure all ways in about the budget."""
    end = time.monotonic() + job.budget
    profile, device = job.profile, job.device
    finetuning = Adapted(profile.size, profile.batch, profile.autocast, device)
    steps = {way: Step(finetuning, way) for way in WAYS}
    with FlopCounterMode(display=False) as counter:
        steps[PLAIN].backward(steps[PLAIN].forward())
    losses = {pooling: LossAlone(finetuning, pooling) for pooling in POOLINGS}
    for loss in losses.values():
        loss.backward(loss.forward())
    where = environment.describe(device)
    where.versions |= {package: metadata.version(package) for package in ("transformers", "peft")}
    samples = measure.time_rounds(_in_turn(steps, losses), device, end, profile.max_rounds)
    # The rounds have warmed up all but the copy.
    steps[WAYS[-1]].backward(steps[WAYS[-1]].forward())
    clock = measure.CPU_TIME if device.type == "cpu" else "both"
    ways = [_way(way, steps[way], finetuning, device) for way in WAYS]
    for way, entry in zip(WAYS, ways, strict=True):
        if str(way) in samples:
            write_times(entry, way, samples, clock)
    plain, again, clocks = samples[str(PLAIN)], samples[AGAIN], (*measure.CLOCKS, measure.CPU_TIME)
    teacher = measure.Call(TeacherPass(finetuning, finetuning.student()).forward)
    return schema.Lora(
        profile=job.name,
        environment=where,
        model=profile.model(finetuning.parameters, adapted.RANK, finetuning.optimiser.weights),
        rounds=len(plain),
        clock=clock,
        noise={c: measure.noise(plain, again, c) for c in clocks},
        ways=ways,
        teacher_memory=measure.peak_memory(teacher, device)["both"],
        losses=[
            _loss(pooling, loss, job, counter.get_total_flops(), samples, clock)
            for pooling, loss in losses.items()
        ],
    )


def _in_turn(
    steps: Mapping[Way, Step], losses: Mapping[str, LossAlone]
) -> dict[str, measure.Timed]:
    """The tasks of a round. A loss alone follows a step, which leaves it the caches."""
    tasks: dict[str, measure.Timed] = {}
    for way, pooling in zip(WAYS[:-1], (*POOLINGS, None, None), strict=True):
        tasks[str(way)] = steps[way]
        if pooling:
            tasks[pooling] = losses[pooling]
    return {**tasks, AGAIN: steps[PLAIN]}


def _way(way: Way, step: Step, finetuning: Adapted, device: torch.device) -> LoraWay:
    """All of a way but its times."""
    steps = []

    def set_up() -> Tensor:
        steps.append(Step(finetuning, way))
        return finetuning.batch.labels

    weights = sum(p.nbytes for p in finetuning.parameters)
    return LoraWay(
        teacher=way.teacher,
        pooling=way.pooling,
        weights=weights + measure.kept_memory(set_up, device),
        memory=measure.peak_memory(step, device),
    )


def write_times(entry: LoraWay, way: Way, samples: Samples, clock: str) -> None:
    """Fill in the seconds, and what is added within a round, by one clock."""
    rounds, plain = samples[str(way)], samples[str(PLAIN)]
    entry.seconds, entry.cpu_seconds = measure.quantiles(rounds), _cpu_seconds(rounds)
    if way.teacher:
        entry.adds = measure.added(rounds, plain, plain, clock)
    if way.pooling:
        entry.loss_adds = measure.added(rounds, samples[str(TEACHER)], plain, clock)


def _loss(
    pooling: str,
    loss: LossAlone,
    job: Job[Profile],
    operations: int,
    samples: Samples,
    clock: str,
) -> LoraLoss:
    profile, device = job.profile, job.device
    rows = profile.batch * (profile.size.tokens if pooling == "tokens" else 1)
    workload = Workload("cka_debiased", rows, profile.size.width)
    return LoraLoss(
        pooling=pooling,
        features=workload.shape,
        predicted_share=(flops.rift_kernels(workload) or 0.0) / operations,
        seconds=measure.quantiles(samples[pooling]),
        cpu_seconds=_cpu_seconds(samples[pooling]),
        share=measure.added(samples[pooling], None, samples[str(PLAIN)], clock),
        memory=measure.peak_memory(loss, device),
        kept=measure.kept_memory(loss.forward, device),
    )


def _cpu_seconds(rounds: list[measure.Seconds]) -> schema.Quantiles:
    return measure.quantiles_of([sample[measure.CPU_TIME] for sample in rounds])


def failures(result: schema.Lora) -> list[str]:
    """Where a step needs more memory than the plain one, the teacher's pass and the loss do."""
    lines, plain = [], result.ways[0]
    for way in result.ways:
        loss = step_table.loss_alone(result, way)
        if loss is None:
            continue
        bound = plain.memory["both"] + result.teacher_memory + loss.memory["both"]
        if way.memory["both"] > bound:
            lines.append(f"{way.pooling}: {way.memory['both']} bytes, more than {bound}")
        if way.weights != plain.weights:
            lines.append(f"{way.pooling}: weights {way.weights}, not {plain.weights}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("lora", __doc__, PROFILES, arguments)
    try:
        result = run(job)
    except adapted.NotInstalledError as error:
        print(f"benchmarks.lora: {error}", file=sys.stderr)
        return 2
    return command.finish(result, out, step_table.lora_summary(result), failures(result))


if __name__ == "__main__":
    sys.exit(main())
