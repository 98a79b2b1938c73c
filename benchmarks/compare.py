"""``python -m benchmarks.compare A B``: what became slower from one result to another.

A and B are result files, or several of one commit each, separated by commas. Times are compared as
ratios to those of naive eager, which ran in turn with them: a machine that is slower as a whole
changes nothing. On a GPU, seconds in CUDA graphs are compared as well.

Two runs of one commit differ: processes lie differently in memory, and machines are shared. So
there are two kinds of regression:

- *All in all*: the mean change of rift_kernels over all workloads, less that of the others, whose
  code is the same. It must exceed ``--threshold``, and what chance makes of so few workloads once
  in 700 times (Student's t). One file of each side is enough.
- *One workload*: its change must exceed ``--threshold``, the bounds within the files, and four
  standard errors of the difference between files. It takes two files or more of each side; with
  one, the workload is a suspect, to be measured again. Two files hardly tell their own spread, so
  it counts as at least that of all workloads together.

Exits with 1 if rift_kernels became slower, became wrong or failed. Else exits with 2 if the files
cannot be compared, or B had no time for a workload of A. Else exits with 0.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import command, files, tables
from .providers import NAIVE, OURS
from .schema import Benchmark, Bounds, Outcome, Workload

THRESHOLD = 0.05
# Standard errors of a normal distribution: for the mean over all, and for any of many workloads.
SIGMAS_OVERALL, SIGMAS_ALONE = 3.0, 4.0

# Workload, provider, clock.
Key = tuple[str, str, str]
# The times of one key, in the files before and in the files after.
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
        # Chance can make anything of two or three workloads.
        chance = f"{math.expm1(self.uncertain):.1%}" if self.uncertain < 1 else "all of it"
        return (
            f"All in all rift_kernels takes {math.expm1(self.mean):+.1%} time ({self.clock}); "
            f"{chance} may be chance."
        )


def read(names: str) -> list[Benchmark]:
    """The benchmarks in these files."""
    results = [files.read(Path(name)) for name in names.split(",")]
    other = next((r.schema for r in results if r.schema != Benchmark.schema), None)
    if other:
        raise ValueError(f"A and B must be a {Benchmark.schema!r}; got {other!r}")
    return [result for result in results if isinstance(result, Benchmark)]


def check(results: Sequence[Benchmark]) -> None:
    """Raise where results have too little in common."""
    # Another profile lacks workloads that it was never meant to have.
    for key in ("profile", "device", "threads"):
        first, *others = dict.fromkeys({**vars(r.environment), **vars(r)}[key] for r in results)
        if others:
            raise ValueError(f"A and B must have one {key}; got {first!r} and {others[0]!r}")


def other_versions(results: Sequence[Benchmark]) -> Iterator[str]:
    """Versions that differ: they may have made naive eager itself faster or slower."""
    for name in ("python", "torch", "cuda", "triton"):
        versions = dict.fromkeys(str(r.environment.versions.get(name)) for r in results)
        if len(versions) > 1:
            yield f"Not by rift_kernels alone: {name} was {', '.join(versions)}."


def changes(before: Sequence[Benchmark], after: Sequence[Benchmark]) -> list[Change]:
    """The change of everything that has been measured before and after."""
    old, new = ([_times(result) for result in side] for side in (before, after))
    sides: dict[Key, Sides] = {}
    for key in dict.fromkeys(key for times in old for key in times):
        first, second = ([times[key] for times in side if key in times] for side in (old, new))
        if second:
            sides[key] = first, second
    pooled = {
        clock: _spread(pair for key, pair in sides.items() if key[2] == clock)
        for clock in ("both", "graph")
    }
    result = []
    for key, pair in sides.items():
        # Files that agree by chance are no proof that the next one does.
        error = max(pooled[key[2]], _spread([pair])) * math.sqrt(sum(1 / len(s) for s in pair))
        uncertain = max(sum(map(_within, pair)), math.expm1(SIGMAS_ALONE * error))
        less, more = (statistics.fmean(map(_log_middle, side)) for side in pair)
        result.append(Change(*key, math.expm1(more - less), uncertain, min(map(len, pair))))
    return result


def _spread(sides: Iterable[Sides]) -> float:
    """The standard deviation between files of one side, as a logarithm; 0 for single files."""
    squares, freedom = 0.0, 0
    for side in (side for pair in sides for side in pair):
        middles = list(map(_log_middle, side))
        squares += sum((middle - statistics.fmean(middles)) ** 2 for middle in middles)
        freedom += len(middles) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def _log_middle(bounds: Bounds) -> float:
    return math.log(bounds.q50)


def _within(side: Sequence[Bounds]) -> float:
    """Half of what lies between the bounds of a file, as a share."""
    return statistics.fmean((b.high - b.low) / 2 / b.q50 for b in side)


def overall(differences: Sequence[Change], clock: str) -> Overall | None:
    """The change of ours as a whole; None where too few workloads tell a mean's error."""
    logs = [(c.provider, math.log1p(c.change)) for c in differences if c.clock == clock]
    ours = [log for provider, log in logs if provider.startswith(OURS)]
    others = [log for provider, log in logs if not provider.startswith(OURS)]
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
    """As rare in Student's t as ``sigmas`` in a normal distribution (Wallace's approximation)."""
    corrected = sigmas * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(corrected**2 / freedom))


def _times(result: Benchmark) -> dict[Key, Bounds]:
    """All times of a result but naive eager's, which they are relative to."""
    times = {}
    for workload in result.workloads:
        for name, outcome in workload.results.items():
            if name != NAIVE and outcome.relative:
                times[_key(workload), name, "both"] = outcome.relative
            if name != NAIVE and outcome.graph:
                graph = Bounds(outcome.graph.q20, outcome.graph.q50, outcome.graph.q80)
                times[_key(workload), name, "graph"] = graph
    return times


def lost(before: Benchmark, after: Benchmark) -> Iterator[str]:
    """Outcomes that were right and are wrong, or were measured and failed or are not in B.

    A workload that was left out as a whole, for lack of time or of features, says nothing.
    """
    new = {_key(w): w for w in after.workloads}
    for key, workload in ((_key(w), w) for w in before.workloads):
        if key in new and new[key].reason is not None:
            continue
        results = new[key].results if key in new else {}
        for name, outcome in workload.results.items():
            now = results.get(name, Outcome(reason="it is not in B"))
            if outcome.reason is None and now.reason is not None:
                yield f"{name}: {key}: not measured: {now.reason}"
            elif outcome.reason is None and now.wrong and not outcome.wrong:
                yield f"{name}: {key}: wrong"


def left_out(before: Sequence[Benchmark], after: Sequence[Benchmark]) -> list[str]:
    """Workloads that were measured before and, as a whole, in none of the files after."""
    measured, now = (
        {_key(w) for result in side for w in result.workloads if w.results}
        for side in (before, after)
    )
    reasons = {_key(w): w.reason for result in after for w in result.workloads if w.reason}
    return [f"{key}: {reason}" for key, reason in reasons.items() if key in measured - now]


def _key(workload: Workload) -> str:
    return f"{workload.measure} {workload.shape}"


def report(differences: Sequence[Change], threshold: float) -> Iterator[str]:
    """What changed, as a table, and how much cannot be told."""
    if not differences:
        yield "Nothing was compared."
        return
    verdicts = [c.verdict(threshold) for c in differences]
    rows = [
        [verdict, c.provider, c.workload, c.clock, f"{c.change:+.1%}", f"{c.uncertain:.1%}"]
        for verdict, c in zip(verdicts, differences, strict=True)
        if verdict != "same"
    ]
    header = ["", "provider", "workload", "clock", "time", "uncertain"]
    yield tables.markdown(header, rows) if rows else "Nothing changed."
    if "unresolved" in verdicts:
        yield (
            f"{verdicts.count('unresolved')} of {len(differences)} are unresolved: more than "
            f"{2 * threshold:.0%} is uncertain, so that no such change would be seen. Longer runs "
            "and more files see more."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="result files of before, separated by commas")
    parser.add_argument("b", metavar="B", help="result files of after")
    parser.add_argument(
        "--threshold", type=command.positive, default=THRESHOLD, help="share; default: 0.05"
    )
    options = parser.parse_args(arguments)
    try:
        before, after = read(options.a), read(options.b)
        check([*before, *after])
    except (OSError, ValueError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    differences = changes(before, after)
    gone = dict.fromkeys(line for a in before for b in after for line in lost(a, b))
    totals = [total for clock in ("both", "graph") if (total := overall(differences, clock))]
    for line in other_versions([*before, *after]):
        print(line)
    paragraphs = [*report(differences, options.threshold), *map(str, totals)]
    print("\n\n".join([*paragraphs, *(f"LOST {line}" for line in gone)]))
    ours = [c for c in differences if c.provider.startswith(OURS)]
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
    missing += [] if ours else ["A and B have no time of rift_kernels in common"]
    for line in missing:
        print(f"benchmarks.compare: cannot compare: {line}", file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
