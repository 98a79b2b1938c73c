"""``python -m benchmarks.frontier``: how wrong gradients are as the student nears its teacher.

There the gradient of linear CKA is small and a difference of near-equal terms. Students are their
teachers plus less and less noise, as they are or rotated; every provider differentiates the same
features, already rounded to their dtype, and is compared with float64 of these, so that an error is
the provider's own. No time is measured. Exits with 1 if rift_kernels failed or was wrong.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import command, environment, files, tables
from .measure import Task
from .oracle import GRADIENT_TOLERANCE, Oracle
from .providers import OURS, Provider, providers
from .schema import FRONTIER
from .side_by_side import able, dtype_name, sentence
from .workloads import BFLOAT16, CKA_MEASURES, Inputs, Workload, features

Result = dict[str, Any]

# Half a decade of 1 - CKA a step, from about 1e-1 to 1e-6.
NOISES = tuple(0.35 * 10 ** (-step / 4) for step in range(11))


@dataclass(frozen=True)
class Profile:
    """Shapes, how near students come, and how many random pairs there are for each point."""

    shapes: tuple[tuple[int, int], ...]
    noises: tuple[float, ...] = NOISES
    pairs: int = 5


# A batch, compared by its Gram matrices, and tokens, by covariances. What some packages do to 4096
# rows is for a GPU.
PROFILES = {
    "cpu": Profile(((64, 768), (512, 64))),
    "gpu": Profile(((64, 768), (4096, 768))),
    "smoke": Profile(((16, 8),), NOISES[::5], pairs=3),
}


def curves(profile: Profile) -> Iterator[tuple[Workload, bool]]:
    """What is computed: workloads, and whether the student is rotated."""
    for rows, width in profile.shapes:
        for dtype in (BFLOAT16, torch.float32):
            for measure in CKA_MEASURES:
                for rotated in (False, True):
                    yield Workload(measure, rows, width, dtype), rotated


def run(
    name: str, profile: Profile, device: torch.device, candidates: Sequence[Provider]
) -> Result:
    found = []
    for workload, rotated in command.progress(list(curves(profile)), lambda curve: str(curve[0])):
        found.append(_curve(workload, rotated, profile, device, able(workload, candidates)))
    return {
        "schema": FRONTIER,
        "profile": name,
        "environment": environment.describe(device),
        "providers": [{"name": p.name, "reason": p.reason} for p in candidates],
        "pairs": profile.pairs,
        "curves": found,
    }


def _curve(
    workload: Workload,
    rotated: bool,
    profile: Profile,
    device: torch.device,
    candidates: Sequence[Provider],
) -> dict[str, Any]:
    """Every provider's errors, from the first noise to the last."""
    results: dict[str, Any] = {p.name: {"reason": None, "errors": []} for p in candidates}
    distances, roundings = [], []
    for noise in profile.noises:
        pairs = []
        for seed in range(profile.pairs):
            inputs = features(workload, device, seed, noise, rotated)
            pairs.append((inputs, Oracle(workload, inputs)))
        distances.append(_spread([1 - oracle.values.item() for _, oracle in pairs]))
        roundings.append(_spread([_rounding(oracle, workload.dtype) for _, oracle in pairs]))
        for provider in candidates:
            entry = results[provider.name]
            if entry["reason"] is not None:
                continue
            try:
                errors = [_error(provider, workload.measure, *pair) for pair in pairs]
            except Exception as error:
                # Code of other people may fail in any way.
                results[provider.name] = {"reason": sentence(error), "errors": []}
            else:
                entry["errors"].append(_spread(errors))
    return {
        "measure": workload.measure,
        "rows": workload.rows,
        "width": workload.width,
        "dtype": dtype_name(workload.dtype),
        "rotated": rotated,
        "distances": distances,
        "rounding": roundings,
        "results": results,
    }


def _error(provider: Provider, measure: str, inputs: Inputs, oracle: Oracle) -> float:
    task = Task(provider, measure, inputs)
    values = task.forward()
    return oracle.errors(values, task.backward(values))[1]


def _rounding(oracle: Oracle, dtype: torch.dtype) -> float:
    """The error of the right gradient in the features' dtype: nobody's can be smaller."""
    rounded = tuple(gradient.to(dtype) for gradient in oracle.gradients)
    return oracle.errors(oracle.values, rounded)[1]


def _spread(numbers: Sequence[float]) -> dict[str, float | None]:
    """NaN counts as infinite; None is infinite."""
    known = sorted(x if math.isfinite(x) else math.inf for x in numbers)
    spread = {"min": known[0], "median": statistics.median(known), "max": known[-1]}
    return {name: x if math.isfinite(x) else None for name, x in spread.items()}


def failures(result: Result) -> list[str]:
    """What of ours failed or was wrong anywhere."""
    found = []
    for curve in result["curves"]:
        for name, entry in curve["results"].items():
            if not name.startswith(OURS):
                continue
            worst = [math.inf if e["max"] is None else e["max"] for e in entry["errors"]]
            if entry["reason"] or max(worst) > GRADIENT_TOLERANCE:
                what = entry["reason"] or f"off by {max(worst):.0e}"
                found.append(f"{name}: {_label(curve)}: {what}")
    return found


def table(result: Result) -> str:
    """Median errors at the smallest distance of each curve."""
    names = [p["name"] for p in result["providers"] if p["reason"] is None]
    rows = []
    for curve in result["curves"]:
        cells = []
        for name in names:
            errors = curve["results"].get(name, {"errors": []})["errors"]
            cells.append(tables.error_text(errors[-1]["median"]) if errors else "-")
        rows.append([_label(curve), tables.error_text(curve["distances"][-1]["median"]), *cells])
    return tables.markdown(["", "1 - CKA", *names], rows)


def _label(curve: dict[str, Any]) -> str:
    kind = curve["measure"].removeprefix("cka_")
    rotated = ", rotated" if curve["rotated"] else ""
    return f"{kind}, {curve['rows']} x {curve['width']} {curve['dtype']}{rotated}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("frontier", __doc__, PROFILES)
    name, device, out = command.settle(parser, parser.parse_args(arguments))
    # Compiled or not, naive code has the same errors.
    candidates = providers(device, compiled=())
    result = run(name, PROFILES[name], device, candidates)
    path = files.write(result, out)
    print(f"{table(result)}\n\nwrote {path}")
    failed = failures(result)
    for failure in failed:
        print(f"FAILED {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
