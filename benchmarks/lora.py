"""``python -m benchmarks.lora``: what RIFT costs in a LoRA finetuning step, in time and memory.

A step of transformers' ViT with adapters by peft: plain, with the teacher's forward pass alone, and
with :class:`~rift_kernels.RIFTRegularizer`, whose teacher is the student without its adapters, or a
copy, whose cost is its memory. The others are timed in interleaved rounds of one run, and the loss
alone among them; on a CPU, shares are of CPU time, which other processes do not lengthen.
``--profile full`` is a ViT-B/16 (ten minutes on a CPU); ``cpu``, a part of ``make bench``, has two
of its layers and smaller images. Exits with 1 if a step with RIFT needs more memory than its parts.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import adapted, command, environment, files, flops, lora_table, measure
from .adapted import ADAPTERS_OFF, COPY, Adapted, LossAlone, Setup, Step, TeacherPass, Way
from .schema import LORA
from .vit import VIT_B_16, Size
from .workloads import Workload

PLAIN, TEACHER, AGAIN = Way(), Way(ADAPTERS_OFF), "plain step again"
POOLINGS = ("cls", "tokens")
WAYS = (PLAIN, TEACHER, *(Way(ADAPTERS_OFF, pooling) for pooling in POOLINGS), Way(COPY, "cls"))

Result = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """A model and its batch; effort as in workloads.py."""

    size: Size
    batch: int
    budget: float
    autocast: bool = False
    max_rounds: int = 100


_VIT_B = dataclasses.replace(VIT_B_16, classes=100)

PROFILES = {
    "cpu": Profile(dataclasses.replace(_VIT_B, image=128, depth=2), 8, budget=28),
    "full": Profile(_VIT_B, 8, budget=600),
    "gpu": Profile(_VIT_B, 64, budget=60, autocast=True),
    "smoke": Profile(Size(16, 4, 16, 2, 2, 4), 8, budget=5, max_rounds=5),
}


def run(name: str, profile: Profile, device: torch.device, budget: float) -> Result:
    """Measure all ways in about ``budget`` seconds."""
    end = time.monotonic() + budget
    finetuning = Adapted(profile.size, profile.batch, profile.autocast, device)
    steps = {way: Step(finetuning, way) for way in WAYS}
    operations = _warm_up(steps[PLAIN])
    losses = {pooling: LossAlone(finetuning, pooling) for pooling in POOLINGS}
    for loss in losses.values():
        loss.backward(loss.forward())
    where = environment.describe(device)
    where["versions"] |= {
        package: metadata.version(package) for package in ("transformers", "peft")
    }
    result: Result = {
        "schema": LORA,
        "profile": name,
        "environment": where,
        "model": _model(finetuning, profile),
    }
    timed = {way: step for way, step in steps.items() if way.teacher != COPY}
    samples = measure.time_rounds(_in_turn(timed, losses), device, end, profile.max_rounds)
    # Memory after the rounds, which have warmed up all but the copy.
    steps[WAYS[-1]].backward(steps[WAYS[-1]].forward())
    weights = sum(p.nbytes for p in finetuning.parameters())
    result["ways"] = [
        {
            "teacher": way.teacher,
            "pooling": way.pooling,
            "weights": weights + measure.kept_memory(Setup(finetuning, way), device),
            "memory": measure.peak_memory(steps[way], device),
        }
        for way in WAYS
    ]
    result["teacher_memory"] = measure.peak_memory(TeacherPass(finetuning), device)["both"]
    result["losses"] = [
        _loss(pooling, profile, losses[pooling], operations, device) for pooling in POOLINGS
    ]
    _write_times(result, samples, measure.CPU_TIME if device.type == "cpu" else "both")
    return result


def _warm_up(plain: Step) -> int:
    """A step, and the floating point operations of its products."""
    with FlopCounterMode(display=False) as counter:
        plain.backward(plain.forward())
    return counter.get_total_flops()


def _model(finetuning: Adapted, profile: Profile) -> Result:
    return {
        **dataclasses.asdict(profile.size),
        "rank": adapted.RANK,
        "parameters": sum(p.numel() for p in finetuning.parameters()),
        "trained": sum(p.numel() for p in finetuning.trained),
        "batch": profile.batch,
        "tokens": profile.size.tokens,
        "autocast": profile.autocast,
    }


def _loss(
    pooling: str, profile: Profile, loss: LossAlone, operations: int, device: torch.device
) -> Result:
    """What is known of a loss without its time."""
    rows = profile.batch * (profile.size.tokens if pooling == "tokens" else 1)
    workload = Workload("cka_debiased", rows, profile.size.width)
    return {
        "pooling": pooling,
        "features": workload.shape,
        "predicted_share": (flops.rift_kernels(workload) or 0.0) / operations,
        "memory": measure.peak_memory(loss, device),
        "kept": measure.kept_memory(loss, device),
    }


def _in_turn(
    steps: Mapping[Way, Step], losses: Mapping[str, LossAlone]
) -> dict[str, measure.Timed]:
    """What a round consists of: a loss alone has the caches that a step has left to it."""
    tasks: dict[str, measure.Timed] = {}
    for i, (way, step) in enumerate(steps.items()):
        tasks[str(way)] = step
        if i < len(POOLINGS):
            tasks[POOLINGS[i]] = losses[POOLINGS[i]]
    return {**tasks, AGAIN: steps[PLAIN]}


def _write_times(result: Result, samples: Mapping[str, list[measure.Seconds]], clock: str) -> None:
    """Seconds, and what is added, by one clock, within a round."""
    plain, teacher, again = samples[str(PLAIN)], samples[str(TEACHER)], samples[AGAIN]
    result["rounds"], result["clock"] = len(plain), clock
    result["noise"] = {
        name: measure.noise(*([one[name] for one in rounds] for rounds in (plain, again)))
        for name in (*measure.CLOCKS, measure.CPU_TIME)
    }
    for way, entry in zip(WAYS, result["ways"], strict=True):
        entry |= dict.fromkeys(("seconds", "cpu_seconds", "adds", "loss_adds"))
        own = samples.get(str(way))
        if own is None:
            continue
        entry |= _seconds(own)
        if way.teacher:
            entry["adds"] = measure.added(own, plain, plain, clock)
        if way.pooling:
            entry["loss_adds"] = measure.added(own, teacher, plain, clock)
    for entry in result["losses"]:
        own = samples[entry["pooling"]]
        entry |= _seconds(own)
        entry["share"] = measure.added(own, None, plain, clock)


def _seconds(rounds: list[measure.Seconds]) -> Result:
    cpu = measure.quantiles_of([one[measure.CPU_TIME] for one in rounds])
    return {"seconds": measure.quantiles(rounds), "cpu_seconds": cpu}


def failures(result: Result) -> list[str]:
    """Where a step needs more memory than the plain one, the teacher's pass and the loss do."""
    found = []
    plain = result["ways"][0]
    for way, rest in lora_table.compared(result):
        bound = plain["memory"]["both"] + result["teacher_memory"] + rest["memory"]["both"]
        if way["memory"]["both"] > bound:
            found.append(f"{way['pooling']}: {way['memory']['both']} bytes, more than {bound}")
        if way["weights"] != plain["weights"]:
            found.append(f"{way['pooling']}: weights {way['weights']}, not {plain['weights']}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("lora", __doc__, PROFILES)
    parser.add_argument("--budget", type=command.positive, help="seconds; default: the profile's")
    options = parser.parse_args(arguments)
    name, device, out = command.settle(parser, options)
    profile = PROFILES[name]
    try:
        result = run(name, profile, device, options.budget or profile.budget)
    except adapted.NotInstalledError as error:
        parser.error(str(error))
    path = files.write(result, out)
    print(f"\n{lora_table.summary(result)}\n\nwrote {path}")
    failed = failures(result)
    for failure in failed:
        print(f"FAILED {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
