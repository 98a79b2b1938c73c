"""``python -m benchmarks.compare A B``: what became slower from one result to another.

A and B are result files, or several of one commit each, separated by commas. Times are compared as
ratios to naive eager's of the same file, which ran in turn with them, so that a machine that is
slower as a whole changes nothing; on a GPU, seconds in CUDA graphs as well.

Two runs of one commit differ, for processes lie differently in memory and machines are shared. So

- *all in all*: the mean change of rift_kernels over all workloads, less that of the others, whose
  code is the same, is a regression where it is larger than ``--threshold`` and than three times its
  standard error; that one file of each can tell;
- *a workload alone* is one where its change is larger than what all files leave uncertain, and
  there are two of each or more; with one of each it is a suspect, to be measured again.

Exits with 1 if rift_kernels became slower, wrong or failed, and with 2 if the files cannot be
compared.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import files, tables
from .providers import NAIVE, OURS
from .schema import BENCHMARK

THRESHOLD = 0.05

Result = dict[str, Any]
Bounds = dict[str, float]


class Change(NamedTuple):
    """How much longer something takes, and how much of that may be chance."""

    workload: str
    provider: str
    clock: str
    change: float
    uncertain: float

    def verdict(self, threshold: float) -> str:
        limit = max(threshold, self.uncertain)
        if self.change > limit:
            return "slower"
        if 1 / (1 + self.change) - 1 > limit:
            return "faster"
        return "unresolved" if self.uncertain > 2 * threshold else "same"


class Overall(NamedTuple):
    """The mean change of ours, less that of the others, and its standard error, as logarithms."""

    mean: float
    error: float

    def is_slower(self, threshold: float) -> bool:
        return self.mean > max(math.log1p(threshold), 3 * self.error)

    def __str__(self) -> str:
        return (
            f"All in all rift_kernels takes {math.expm1(self.mean):+.1%} of its time, give or take "
            f"{math.expm1(self.error):.1%}."
        )


class CompareError(Exception):
    """Why two files cannot be compared; the message is for the user."""


def check(results: Sequence[Result]) -> None:
    for result in results:
        if result["schema"] != BENCHMARK:
            raise CompareError(f"A and B must be a {BENCHMARK!r}; got {result['schema']!r}")
        for key in ("device", "threads"):
            one, other = (r["environment"][key] for r in (results[0], result))
            if one != other:
                raise CompareError(f"A and B must have one {key}; got {one!r} and {other!r}")


def changes(before: Sequence[Result], after: Sequence[Result]) -> list[Change]:
    """Of everything that all of them have measured."""
    old, new = ([_times(result) for result in side] for side in (before, after))
    found = []
    for key in old[0]:
        sides = [[times[key] for times in side if key in times] for side in (old, new)]
        if len(sides[0]) == len(old) and len(sides[1]) == len(new):
            workload, provider, clock = key
            middles = [statistics.median(b["q50"] for b in side) for side in sides]
            uncertain = sum(map(_uncertain, sides))
            change = middles[1] / middles[0] - 1
            found.append(Change(workload, provider, clock, change, uncertain))
    return found


def overall(found: Sequence[Change]) -> Overall | None:
    """None where there is too little to tell a mean's error."""
    ours, others = (
        [math.log1p(c.change) for c in found if c.provider.startswith(OURS) == wanted]
        for wanted in (True, False)
    )
    if len(ours) < 2:
        return None
    mean, error = _mean(ours)
    if len(others) >= 2:
        shift, other_error = _mean(others)
        mean, error = mean - shift, math.hypot(error, other_error)
    return Overall(mean, error)


def _mean(numbers: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))


def _times(result: Result) -> dict[tuple[str, str, str], Bounds]:
    """By workload, provider and clock; naive eager is what they are relative to."""
    found = {}
    for workload in result["workloads"]:
        for name, entry in workload["results"].items():
            if name == NAIVE or entry["reason"]:
                continue
            if entry["relative"]:
                found[_key(workload), name, "both"] = entry["relative"]
            if entry["graph"]:
                low, middle, high = (entry["graph"][q] for q in ("q20", "q50", "q80"))
                found[_key(workload), name, "graph"] = {"low": low, "q50": middle, "high": high}
    return found


def _uncertain(side: Sequence[Bounds]) -> float:
    """Half of what lies between bounds, and between files, as a share."""
    middles = [b["q50"] for b in side]
    within = statistics.fmean((b["high"] - b["low"]) / 2 / b["q50"] for b in side)
    return within + (max(middles) - min(middles)) / 2 / statistics.median(middles)


def lost(before: Result, after: Result) -> list[str]:
    """What was right and is wrong, was measured and failed or is not there."""
    found = []
    for workload, name, old, new in _pairs(before, after):
        if old["reason"] is not None:
            continue
        if new["reason"] is not None:
            found.append(f"{name}: {workload}: not measured: {new['reason']}")
        elif new["wrong"] and not old["wrong"]:
            found.append(f"{name}: {workload}: wrong")
    return found


def _pairs(before: Result, after: Result) -> Iterator[tuple[str, str, Result, Result]]:
    """Workload, provider, and their entries; what is not in B has failed."""
    new = {_key(w): w for w in after["workloads"]}
    gone = {"reason": "it is not in B"}
    for workload in before["workloads"]:
        other = new.get(_key(workload), {"results": {}, "reason": None})
        for name, entry in workload["results"].items():
            missing = {"reason": other["reason"]} if other["reason"] else gone
            yield _key(workload), name, entry, other["results"].get(name, missing)


def _key(workload: Result) -> str:
    return f"{workload['measure']} {workload['shape']}"


def table(found: Sequence[Change], threshold: float) -> str:
    rows = [
        [
            change.verdict(threshold),
            change.provider,
            change.workload,
            change.clock,
            f"{change.change:+.1%}",
            f"{change.uncertain:.1%}",
        ]
        for change in found
        if change.verdict(threshold) != "same"
    ]
    header = ["", "provider", "workload", "clock", "time", "uncertain"]
    return tables.markdown(header, rows) if rows else "Nothing changed."


def _read(names: str) -> list[Result]:
    return [files.read(Path(name)) for name in names.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="result files of before, separated by commas")
    parser.add_argument("b", metavar="B", help="result files of after")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share; default: 0.05")
    options = parser.parse_args(arguments)
    if not options.threshold > 0:
        parser.error(f"argument --threshold: must be positive, got {options.threshold:g}")
    try:
        before, after = _read(options.a), _read(options.b)
        check([*before, *after])
    except (OSError, ValueError, CompareError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    found = changes(before, after)
    gone = [line for result in after for line in lost(before[0], result)]
    total = overall(found)
    print("\n\n".join(_text(found, total, gone, options.threshold)))
    several = min(len(before), len(after)) > 1
    slower = [c.provider for c in found if c.verdict(options.threshold) == "slower"]
    suspects = [name for name in slower if name.startswith(OURS)]
    failed = any(line.startswith(OURS) for line in gone) or (several and bool(suspects))
    failed = failed or (total is not None and total.is_slower(options.threshold))
    if suspects and not several:
        print(f"\n{len(suspects)} suspects: several files each tell them from chance.")
    if failed:
        print("\nREGRESSION")
    return 1 if failed else 0


def _text(
    found: Sequence[Change], total: Overall | None, gone: Sequence[str], threshold: float
) -> Iterator[str]:
    yield table(found, threshold)
    unresolved = sum(c.verdict(threshold) == "unresolved" for c in found)
    if unresolved:
        yield (
            f"{unresolved} of {len(found)} are unresolved: more than {2 * threshold:.0%} is "
            "uncertain, so that no such change would be seen. Longer runs see more."
        )
    if total:
        yield str(total)
    yield from (f"LOST {line}" for line in gone)


if __name__ == "__main__":
    sys.exit(main())
