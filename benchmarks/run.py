"""``python -m benchmarks.run``: compare all providers side by side, write one JSON file.

The file has the form that ``benchmarks/schema.py`` describes and is never overwritten. The
predictions are printed before anything is measured. Exits with 1 if rift_kernels failed or was
wrong, or nothing was measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import command, environment, files, measure, side_by_side, tables
from .providers import NAIVE, OURS, Provider, providers
from .schema import BENCHMARK
from .workloads import PROFILES, Inputs, Profile, Workload

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

Result = dict[str, Any]


def run(
    name: str,
    profile: Profile,
    device: torch.device,
    candidates: Sequence[Provider],
    budget: float,
) -> Result:
    """Measure a profile's workloads in about ``budget`` seconds, divided among them as it goes."""
    end = time.monotonic() + budget
    peaks = {
        side_by_side.dtype_name(dtype): measure.matmul_peak(dtype, profile.probe, device)
        for dtype in DTYPES
    }
    bandwidth = measure.copy_bandwidth(profile.probe // 8, device)
    entries = [side_by_side.describe(w, candidates, peaks, bandwidth) for w in profile.workloads]
    print(tables.predictions(entries), flush=True)
    _warm_up(device, bool(profile.compiled))
    # What the cheap ones leave of their part goes to those that need more.
    pairs = sorted(zip(entries, profile.workloads, strict=True), key=_predicted_cost)
    for done, (entry, workload) in enumerate(command.progress(pairs, lambda pair: str(pair[1]))):
        seconds = (end - time.monotonic()) / (len(pairs) - done)
        side_by_side.complete(entry, workload, candidates, device, seconds, profile.max_rounds)
    return {
        "schema": BENCHMARK,
        "profile": name,
        "environment": environment.describe(device),
        "peaks": {"matmul_flops": peaks, "copy_bytes": bandwidth},
        "providers": [{"name": p.name, "reason": p.reason} for p in candidates],
        "workloads": entries,
    }


def failures(result: Result) -> list[str]:
    """What of ours failed or was wrong."""
    found = [] if any(w["results"] for w in result["workloads"]) else ["nothing was measured"]
    for workload in result["workloads"]:
        for name, entry in workload["results"].items():
            if name.startswith(OURS) and (entry["reason"] or entry["wrong"]):
                what = entry["reason"] or "wrong"
                found.append(f"{name}: {workload['measure']} {workload['shape']}: {what}")
    return found


def _warm_up(device: torch.device, compiled: bool) -> None:
    """What a process does once and slowly, whatever the workload."""
    ones = torch.ones(1, device=device, requires_grad=True)
    first = Provider("first", {"": lambda inputs: inputs.students[0] * inputs.teachers[0]})
    measure.peak_memory(measure.Task(first, "", Inputs([ones], [ones.detach()])), device)
    if compiled:
        try:
            torch.compile(lambda x: x.sin().sum())(ones).backward()
        except Exception as error:
            # Every workload will then say the same in its place.
            print(f"torch.compile does not work here: {error}")


def _predicted_cost(pair: tuple[side_by_side.Entry, Workload]) -> float:
    return pair[0]["predicted_seconds"].get(NAIVE) or 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("run", __doc__, PROFILES)
    parser.add_argument("--budget", type=command.positive, help="seconds; default: the profile's")
    options = parser.parse_args(arguments)
    name, device, out = command.settle(parser, options)
    profile = PROFILES[name]
    candidates = providers(device, profile.compiled)
    budget = options.budget or profile.budget
    result = run(name, profile, device, candidates, budget)

    path = files.write(result, out)
    print(f"\n{tables.details(result)}\n\n{tables.summary(result)}\n\nwrote {path}")
    failed = failures(result)
    for failure in failed:
        print(f"FAILED {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
