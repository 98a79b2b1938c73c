"""``python -m benchmarks.step``: what a finetuning step costs with the loss, and without.

A step of a vision transformer, forward, loss, backward and optimiser: plain, with the teacher's
forward pass, with a loss on the teacher's cached features, and with both; the loss by naive code
and by every backend of rift_kernels that can run. All are timed in interleaved rounds of one run.
The predictions are printed before anything is measured. Exits with 1 if rift_kernels failed or was
wrong, or nothing was measured.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from rift_kernels.dispatch import availability
from rift_kernels.dispatch.plan import use_gram

from . import command, environment, files, measure, step_table
from .finetuning import CLASS_TOKENS, TOKENS, Features, Finetuning, Step, Way
from .oracle import wrong
from .providers import NAIVE, OURS, WIDE, Provider, providers
from .schema import STEP
from .side_by_side import dtype_name, sentence
from .vit import VIT_B_16, Size, ViT

PLAIN, AGAIN = Way(), "plain step again"

Result = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """A model, its batch and what of it is compared; effort as in workloads.py."""

    size: Size
    batch: int
    features: tuple[Features, ...]
    autocast: bool
    budget: float
    probe: int
    max_rounds: int = 100


_FLOAT32 = (Features(CLASS_TOKENS, torch.float32), Features(TOKENS, torch.float32))

PROFILES = {
    "cpu": Profile(Size(64, 8, 192, 4, 3, 100), 16, _FLOAT32, False, budget=40, probe=2048),
    # Autocast leaves the states in float32; who casts them first has less to read and multiply.
    "gpu": Profile(
        VIT_B_16,
        64,
        (*_FLOAT32, Features(TOKENS, torch.bfloat16)),
        autocast=True,
        budget=90,
        probe=8192,
    ),
    "smoke": Profile(
        Size(16, 4, 16, 2, 2, 4), 8, _FLOAT32, False, budget=5, probe=64, max_rounds=5
    ),
}


class Count(NamedTuple):
    """Floating point operations."""

    forward: int
    both: int


def model_flops(size: Size, batch: int) -> Count:
    """Of the model's products, forward, and with the backward; counted, not computed."""
    with torch.device("meta"):
        model = ViT(size)
        images = torch.empty(batch, 3, size.image, size.image)
        labels = torch.empty(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = cross_entropy(model.logits(model(images)), labels)
        forward = counter.get_total_flops()
        loss.backward()
    return Count(forward, counter.get_total_flops())


def plan(
    profile: Profile, device: torch.device, candidates: Mapping[str, Provider]
) -> tuple[list[Way], list[Result]]:
    """All ways, and the losses that are no part of them, with the reasons."""
    ways = [PLAIN, Way(teacher_runs=True)]
    left_out: list[Result] = [
        {"loss": p.name, "features": None, "reason": p.reason}
        for p in candidates.values()
        if p.name.startswith(OURS) and p.reason
    ]
    for features in profile.features:
        losses = [NAIVE]
        if profile.autocast and features.dtype == torch.float32:
            # For autocast multiplies float32 features in bfloat16.
            losses.append(WIDE)
        for name in (n for n, p in candidates.items() if n.startswith(OURS) and p.reason is None):
            reason = _refusal(name, features, profile, device)
            if reason is None:
                losses.append(name)
            else:
                label = features.label(profile.size, profile.batch)
                left_out.append({"loss": name, "features": label, "reason": reason})
        ways += [Way(name, features, runs) for name in losses for runs in (False, True)]
    return ways, left_out


def _refusal(name: str, features: Features, profile: Profile, device: torch.device) -> str | None:
    """Why a backend does not take these features, if it does not."""
    w = features.workload(profile.size, profile.batch)
    gram = use_gram("cka", w.rows, w.width, w.width)
    problem = availability.Problem("cka", (gram,) * w.layers, w.rows, w.width)
    return availability.reason_against(name.removeprefix(OURS), device, [w.dtype], problem)


def predicted(
    way: Way,
    profile: Profile,
    count: Count,
    candidates: Mapping[str, Provider],
    peaks: Mapping[str, float],
) -> float:
    """Seconds of the products of the model, the teacher and the loss, each at its dtype's peak."""
    dtype = torch.bfloat16 if profile.autocast else torch.float32
    operations = count.both + (count.forward if way.teacher_runs else 0)
    seconds = operations / peaks[dtype_name(dtype)]
    if way.loss and way.features:
        provider = candidates[way.loss]
        workload = way.features.workload(profile.size, profile.batch)
        products_in = provider.products_in or workload.dtype
        if way.loss == NAIVE and profile.autocast:
            products_in = dtype
        seconds += (provider.flops(workload) or 0.0) / peaks[dtype_name(products_in)]
    return seconds


def run(
    name: str,
    profile: Profile,
    device: torch.device,
    budget: float,
    candidates: Sequence[Provider],
) -> Result:
    """Measure all ways in about ``budget`` seconds."""
    end = time.monotonic() + budget
    by_name = {p.name: p for p in candidates}
    dtypes = {torch.float32, *(f.dtype for f in profile.features)}
    dtypes |= {torch.bfloat16} if profile.autocast else set()
    peaks = {dtype_name(d): measure.matmul_peak(d, profile.probe, device) for d in dtypes}
    count = model_flops(profile.size, profile.batch)
    ways, left_out = plan(profile, device, by_name)
    finetuning = Finetuning(profile.size, profile.batch, profile.autocast, device)
    result = {
        "schema": STEP,
        "profile": name,
        "environment": environment.describe(device),
        "peaks": {"matmul_flops": peaks},
        "model": {
            **dataclasses.asdict(profile.size),
            "parameters": sum(p.numel() for p in finetuning.student.parameters()),
            "batch": profile.batch,
            "tokens": profile.size.tokens,
            "autocast": profile.autocast,
        },
        "rounds": 0,
        "noise": {},
        "ways": [
            _entry(way, profile, predicted(way, profile, count, by_name, peaks)) for way in ways
        ],
        "left_out": left_out,
    }
    print(step_table.predictions(result), flush=True)
    _complete(result, ways, finetuning, device, end, profile.max_rounds)
    return result


def _entry(way: Way, profile: Profile, seconds: float) -> Result:
    """What is known before anything is measured."""
    return {
        "loss": way.loss,
        "features": way.features and way.features.label(profile.size, profile.batch),
        "teacher_runs": way.teacher_runs,
        "predicted_seconds": seconds,
        "reason": None,
        "seconds": None,
        "memory": None,
        "gradient_error": None,
        "wrong": False,
    }


def _complete(
    result: Result,
    ways: Sequence[Way],
    finetuning: Finetuning,
    device: torch.device,
    end: float,
    max_rounds: int,
) -> None:
    """Check all ways, time those that run, and write what was found into the result.

    The plain step is timed twice, which gives the noise.
    """
    tasks: dict[str, Step] = {}
    entries = dict(zip(map(str, ways), result["ways"], strict=True))
    for way in ways:
        try:
            tasks[str(way)] = _examined(way, entries[str(way)], finetuning, device)
        except Exception as error:
            # A way that fails is no reason to lose the others.
            entries[str(way)]["reason"] = sentence(error)
    if str(PLAIN) not in tasks:
        return
    tasks[AGAIN] = tasks[str(PLAIN)]
    samples = measure.time_rounds(tasks, device, end, max_rounds)
    result["rounds"] = len(samples[AGAIN])
    again = samples.pop(AGAIN)
    for name, rounds in samples.items():
        entries[name]["seconds"] = measure.quantiles(rounds)
    for clock in measure.CLOCKS:
        result["noise"][clock] = measure.noise(
            *([seconds[clock] for seconds in rounds] for rounds in (samples[str(PLAIN)], again))
        )


def _examined(way: Way, entry: Result, finetuning: Finetuning, device: torch.device) -> Step:
    """A way's step, warm; its entry gets its memory, and how right its loss is."""
    step = Step(finetuning, way)
    step.backward(step.forward())
    entry["memory"] = measure.peak_memory(step, device)
    if way.loss and way.features:
        error = finetuning.gradient_error(way.loss, way.features)
        entry["gradient_error"] = error if math.isfinite(error) else None
        entry["wrong"] = wrong(0.0, error)
    return step


def failures(result: Result) -> list[str]:
    """What of ours failed or was wrong."""
    found = [] if any(w["seconds"] for w in result["ways"]) else ["nothing was measured"]
    for way in result["ways"]:
        if (way["loss"] or "").startswith(OURS) and (way["reason"] or way["wrong"]):
            found.append(f"{way['loss']}: {way['features']}: {way['reason'] or 'wrong'}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("step", __doc__, PROFILES)
    parser.add_argument("--budget", type=command.positive, help="seconds; default: the profile's")
    options = parser.parse_args(arguments)
    name, device, out = command.settle(parser, options)
    profile = PROFILES[name]
    budget = options.budget or profile.budget
    result = run(name, profile, device, budget, providers(device, compiled=()))
    path = files.write(result, out)
    print(f"\n{step_table.summary(result)}\n\nwrote {path}")
    failed = failures(result)
    for failure in failed:
        print(f"FAILED {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
