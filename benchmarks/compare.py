"""``python -m benchmarks.compare A B``: what became slower from one result to another.

A and B are result files, or several of one commit each, separated by commas. Times are compared as
ratios to naive eager's of the same file, which ran in turn with them, so that a machine that is
slower as a whole changes nothing; on a GPU, seconds in CUDA graphs as well.

Two runs of one commit differ, for processes lie differently in memory and machines are shared. So

- *all in all*: the mean change of rift_kernels over all workloads, less that of the others, whose
  code is the same, is a regression where it is larger than ``--threshold`` and than what chance
  makes of so few workloads once in 700 times (Student's t); that one file of each can tell;
- *a workload alone* is one where its change is larger than ``--threshold``, than the bounds within
  the files and than four standard errors of the difference between files, and there are two of
  each or more; with one of each it is a suspect, to be measured again. Two files hardly tell their
  own spread, so that it counts as at least that of all workloads together.

Exits with 1 if rift_kernels became slower, wrong or failed, else with 2 if the files cannot be
compared, or not wholly, for B had no time for a workload of A, and else with 0.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import files, tables
from .providers import NAIVE, OURS
from .schema import BENCHMARK

THRESHOLD = 0.05
# Of a normal distribution, for the one mean over all, and for any of many workloads.
SIGMAS_OVERALL, SIGMAS_ALONE = 3.0, 4.0

Result = dict[str, Any]
Bounds = dict[str, float]
# Workload, provider, clock.
Key = tuple[str, str, str]
# What the files before and the files after have of one of these.
Sides = tuple[list[Bounds], list[Bounds]]


class Change(NamedTuple):
    """How much longer something takes, how much of that may be chance, and of how many files."""

    workload: str
    provider: str
    clock: str
    change: float
    uncertain: float
    files: int = 1

    def verdict(self, threshold: float) -> str:
        limit = max(threshold, self.uncertain)
        if self.change > limit:
            return "slower"
        if 1 / (1 + self.change) - 1 > limit:
            return "faster"
        return "unresolved" if self.uncertain > 2 * threshold else "same"


class Overall(NamedTuple):
    """The mean change of ours, less that of the others, and what may be chance; logarithms."""

    clock: str
    mean: float
    uncertain: float

    def is_slower(self, threshold: float) -> bool:
        return self.mean > max(math.log1p(threshold), self.uncertain)

    def __str__(self) -> str:
        # Of two or three, chance can make anything.
        chance = f"{math.expm1(self.uncertain):.1%}" if self.uncertain < 1 else "all of it"
        return (
            f"All in all rift_kernels takes {math.expm1(self.mean):+.1%} time ({self.clock}); "
            f"{chance} may be chance."
        )


class CompareError(Exception):
    """Why two files cannot be compared; the message is for the user."""


def check(results: Sequence[Result]) -> None:
    for result in results:
        if result["schema"] != BENCHMARK:
            raise CompareError(f"A and B must be a {BENCHMARK!r}; got {result['schema']!r}")
        # Of another profile, what is missing was never meant to be there.
        for key in ("profile", "device", "threads"):
            one, other = ({**r["environment"], **r}[key] for r in (results[0], result))
            if one != other:
                raise CompareError(f"A and B must have one {key}; got {one!r} and {other!r}")


def other_versions(results: Sequence[Result]) -> Iterator[str]:
    """What may have made naive eager itself faster or slower."""
    versions = [result["environment"]["versions"] for result in results]
    for name in ("python", "torch", "cuda", "triton"):
        found = dict.fromkeys(str(v.get(name)) for v in versions)
        if len(found) > 1:
            yield f"Not by rift_kernels alone: {name} was {', '.join(found)}."


def changes(before: Sequence[Result], after: Sequence[Result]) -> list[Change]:
    """Of everything that has been measured before and after."""
    sides = dict(_sides(before, after))
    pooled = {clock: _pooled(sides, clock) for clock in {key[2] for key in sides}}
    found = []
    for key, (old, new) in sides.items():
        middles = [statistics.fmean(map(_log_middle, side)) for side in (old, new)]
        # Files that agree by chance are no proof that the next one does.
        spread = max(pooled[key[2]], _spread([(old, new)]))
        error = spread * math.sqrt(1 / len(old) + 1 / len(new))
        uncertain = max(_within(old) + _within(new), math.expm1(SIGMAS_ALONE * error))
        change = math.expm1(middles[1] - middles[0])
        found.append(Change(*key, change, uncertain, min(len(old), len(new))))
    return found


def _sides(before: Sequence[Result], after: Sequence[Result]) -> Iterator[tuple[Key, Sides]]:
    old, new = ([_times(result) for result in side] for side in (before, after))
    for key in dict.fromkeys(key for times in old for key in times):
        found = tuple([times[key] for times in side if key in times] for side in (old, new))
        if found[1]:
            yield key, (found[0], found[1])


def _pooled(sides: Mapping[Key, Sides], clock: str) -> float:
    return _spread([found for key, found in sides.items() if key[2] == clock])


def _spread(sides: Iterable[Sides]) -> float:
    """The standard deviation between files of one side, as a logarithm; 0 of single files."""
    squares, freedom = 0.0, 0
    for side in (side for both in sides for side in both):
        middles = list(map(_log_middle, side))
        mean = statistics.fmean(middles)
        squares += sum((middle - mean) ** 2 for middle in middles)
        freedom += len(middles) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def _log_middle(bounds: Bounds) -> float:
    return math.log(bounds["q50"])


def _within(side: Sequence[Bounds]) -> float:
    """Half of what lies between the bounds of a file, as a share."""
    return statistics.fmean((b["high"] - b["low"]) / 2 / b["q50"] for b in side)


def overall(found: Sequence[Change], clock: str) -> Overall | None:
    """None where there is too little to tell a mean's error."""
    ours, others = (
        [
            math.log1p(c.change)
            for c in found
            if c.clock == clock and c.provider.startswith(OURS) == wanted
        ]
        for wanted in (True, False)
    )
    if len(ours) < 2:
        return None
    mean, variance = statistics.fmean(ours), statistics.variance(ours) / len(ours)
    freedom = len(ours) - 1.0
    if len(others) >= 2:
        mean -= statistics.fmean(others)
        other = statistics.variance(others) / len(others)
        parts = variance**2 / freedom + other**2 / (len(others) - 1)
        # Welch and Satterthwaite's; if nothing differs at all, any number does.
        freedom = (variance + other) ** 2 / parts if parts else freedom
        variance += other
    return Overall(clock, mean, student(SIGMAS_OVERALL, freedom) * math.sqrt(variance))


def student(sigmas: float, freedom: float) -> float:
    """As rare of Student's t as ``sigmas`` of a normal distribution (Wallace's approximation)."""
    corrected = sigmas * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(corrected**2 / freedom))


def _times(result: Result) -> dict[Key, Bounds]:
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
    """Workload, provider, and their entries; what is not in B has failed.

    A workload that was left out as a whole, for lack of time or of features, says nothing.
    """
    new = {_key(w): w for w in after["workloads"]}
    gone = {"reason": "it is not in B"}
    for workload in before["workloads"]:
        other = new.get(_key(workload), {"results": {}, "reason": None})
        if other["reason"] is None:
            for name, entry in workload["results"].items():
                yield _key(workload), name, entry, other["results"].get(name, gone)


def left_out(before: Sequence[Result], after: Sequence[Result]) -> list[str]:
    """Workloads that were measured before and, as a whole, in none of the files after."""
    measured, now = (
        {_key(w) for result in side for w in result["workloads"] if w["results"]}
        for side in (before, after)
    )
    reasons = {_key(w): w["reason"] for r in after for w in r["workloads"] if w["reason"]}
    return [f"{key}: {reason}" for key, reason in reasons.items() if key in measured - now]


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
    if not found:
        return "Nothing was compared."
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
    gone = dict.fromkeys(line for a in before for b in after for line in lost(a, b))
    totals = [total for clock in ("both", "graph") if (total := overall(found, clock))]
    for line in other_versions([*before, *after]):
        print(line)
    print("\n\n".join(_text(found, totals, [*gone], options.threshold)))
    ours = [c for c in found if c.provider.startswith(OURS)]
    slower = [c for c in ours if c.verdict(options.threshold) == "slower"]
    suspects = sum(c.files == 1 for c in slower)
    if suspects:
        print(f"\n{suspects} suspects: several files each tell them from chance.")
    if (
        len(slower) > suspects
        or any(line.startswith(OURS) for line in gone)
        or any(total.is_slower(options.threshold) for total in totals)
    ):
        print("\nREGRESSION")
        return 1
    missing = left_out(before, after)
    if not ours:
        missing.append("A and B have no time of rift_kernels in common")
    for line in missing:
        print(f"benchmarks.compare: cannot compare: {line}", file=sys.stderr)
    return 2 if missing else 0


def _text(
    found: Sequence[Change], totals: Sequence[Overall], gone: Sequence[str], threshold: float
) -> Iterator[str]:
    yield table(found, threshold)
    unresolved = sum(c.verdict(threshold) == "unresolved" for c in found)
    if unresolved:
        yield (
            f"{unresolved} of {len(found)} are unresolved: more than {2 * threshold:.0%} is "
            "uncertain, so that no such change would be seen. Longer runs and more files see more."
        )
    yield from map(str, totals)
    yield from (f"LOST {line}" for line in gone)


if __name__ == "__main__":
    sys.exit(main())
