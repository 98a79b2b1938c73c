"""``python -m benchmarks.compare A B``: what became slower from one result to another.

A and B are result files, or several of one commit each, separated by commas. Times are compared as
ratios to those of naive eager, which ran in turn with them: a machine that is slower as a whole
changes nothing. On a GPU, seconds in CUDA graphs are compared as well.

Two runs of one commit differ: processes lie differently in memory, and machines are shared. A
change therefore counts where it exceeds 5 % and four standard errors, of

- the mean over all workloads, less the mean of other providers, whose code is the same;
- one workload, by the spread between files. With one file a side there is none: a workload slower
  beyond the bounds within the files is then only a suspect, to be measured again.

Exits with 1 if rift_kernels became slower, or B lacks a right outcome that A has.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import files, tables
from .providers import NAIVE, OURS
from .schema import Benchmark

THRESHOLD = math.log(1.05)
SIGMAS = 4.0
MIN_WORKLOADS = 5  # fewer do not tell the error of their mean


class Time(NamedTuple):
    log: float
    within: float  # half of what lies between the bounds within a file, as a share


class Change(NamedTuple):
    """How much longer something takes, and how much of that may be chance; logarithms."""

    provider: str
    workload: str
    clock: str
    change: float
    uncertain: float
    single: bool = False  # whether a side is one file, which does not tell its spread

    @property
    def verdict(self) -> str:
        if abs(self.change) <= max(THRESHOLD, self.uncertain):
            return "unresolved" if self.uncertain > 2 * THRESHOLD else "same"
        slower = "suspect" if self.single else "slower"
        return slower if self.change > 0 else "faster"


def changes(before: Sequence[Benchmark], after: Sequence[Benchmark], clock: str) -> list[Change]:
    """The change of everything that was measured before and after, and all in all."""
    old, new = _times(before, clock), _times(after, clock)
    pairs = {key: (old[key], new[key]) for key in old if key in new}
    pooled = _spread(side for pair in pairs.values() for side in pair)
    result = []
    for key, pair in pairs.items():
        # Files that agree by chance are no proof that the next one does.
        error = max(pooled, _spread(pair)) * math.sqrt(sum(1 / len(side) for side in pair))
        within = sum(statistics.fmean(time.within for time in side) for side in pair)
        less, more = (statistics.fmean(time.log for time in side) for side in pair)
        uncertain, single = max(within, SIGMAS * error), min(map(len, pair)) == 1
        result.append(Change(*key, clock, more - less, uncertain, single))
    return [*_overall(result, clock), *result]


def _overall(every: Sequence[Change], clock: str) -> Iterator[Change]:
    """The mean change of ours, less that of the others."""
    ours = [c.change for c in every if c.provider.startswith(OURS)]
    others = [c.change for c in every if not c.provider.startswith(OURS)]
    samples = [ours, others] if len(others) >= MIN_WORKLOADS else [ours]
    if len(ours) >= MIN_WORKLOADS:
        mean, *shift = map(statistics.fmean, samples)
        error = math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in samples))
        yield Change(OURS, "all in all", clock, mean - sum(shift), SIGMAS * error)


def _spread(sides: Iterable[Sequence[Time]]) -> float:
    """The standard deviation between files of one side; 0 for single files."""
    variances = [statistics.variance(t.log for t in side) for side in sides if len(side) > 1]
    return math.sqrt(statistics.fmean(variances)) if variances else 0.0


def _times(results: Sequence[Benchmark], clock: str) -> dict[tuple[str, str], list[Time]]:
    """All times but those of naive eager, which they are relative to."""
    times = defaultdict(list)
    for w in (w for result in results for w in result.workloads):
        for name, outcome in w.results.items():
            seconds = outcome.graph if clock == "graph" else outcome.relative
            if seconds and name != NAIVE:
                low, middle, high = vars(seconds).values()
                time = Time(math.log(middle), (high - low) / 2 / middle)
                times[name, f"{w.measure} {w.shape}"].append(time)
    return times


def right(results: Sequence[Benchmark]) -> set[str]:
    """What any of the files has a right outcome of."""
    return {
        f"{name} {w.measure} {w.shape}"
        for result in results
        for w in result.workloads
        for name, outcome in w.results.items()
        if outcome.reason is None and not outcome.wrong
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="result files of before, separated by commas")
    parser.add_argument("b", metavar="B", help="result files of after")
    options = parser.parse_args(arguments)
    before, after = (
        [files.read(Path(name)) for name in side.split(",")] for side in (options.a, options.b)
    )
    every = [*before, *after]
    if not all(isinstance(result, Benchmark) for result in every):
        parser.error("A and B must be results of python -m benchmarks.run")
    for key in ("profile", "device", "threads"):
        values = {str({**vars(r.environment), **vars(r)}[key]) for r in every}
        if len(values) > 1:
            parser.error(f"A and B must have one {key}; got {' and '.join(sorted(values))}")
    differences = [c for clock in ("both", "graph") for c in changes(before, after, clock)]
    rows = [
        [c.verdict, c.provider, c.workload, c.clock, *(f"{math.expm1(x):+.1%}" for x in c[3:5])]
        for c in differences
        if c.verdict != "same"
    ]
    header = ["", "provider", "workload", "clock", "time", "uncertain"]
    print(tables.markdown(header, rows) if rows else "Nothing changed.")
    lost = sorted(right(before) - right(after))
    print(*(f"LOST {name}" for name in lost), sep="\n")
    slower = [c.provider for c in differences if c.verdict == "slower"]
    regression = any(name.startswith(OURS) for name in (*slower, *lost))
    print("REGRESSION" * regression)
    return int(regression)


if __name__ == "__main__":
    sys.exit(main())
