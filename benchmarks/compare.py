"""``python -m benchmarks.compare A B``: what became slower from one result file to another.

Times are compared as ratios to naive eager's of the same file, which ran in turn with them, so that
a machine that is slower as a whole changes nothing; on a GPU, seconds in CUDA graphs as well. A
change counts where it is larger than ``--threshold`` and than what both files leave uncertain;
where they leave more uncertain than that, it says so instead. Exits with 1 if rift_kernels became
slower, wrong or failed, and with 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import files, tables
from .providers import NAIVE, OURS
from .schema import BENCHMARK

# Two runs of one commit differ by up to this much on a shared machine: processes lie differently in
# memory, and libraries choose anew.
THRESHOLD = 0.08

Result = dict[str, Any]


class Change(NamedTuple):
    """How much longer something takes, and how much of that may be chance."""

    workload: str
    provider: str
    clock: str
    change: float
    uncertain: float

    def verdict(self, threshold: float) -> str:
        if self.change > max(threshold, self.uncertain):
            return "slower"
        if 1 / (1 + self.change) - 1 > max(threshold, self.uncertain):
            return "faster"
        return "unresolved" if self.uncertain > threshold else "same"


class CompareError(Exception):
    """Why two files cannot be compared; the message is for the user."""


def check(before: Result, after: Result) -> None:
    for name, result in (("A", before), ("B", after)):
        if result["schema"] != BENCHMARK:
            raise CompareError(f"{name} must be a {BENCHMARK!r}; got {result['schema']!r}")
    for key in ("device", "threads"):
        one, other = (result["environment"][key] for result in (before, after))
        if one != other:
            raise CompareError(f"A and B must have one {key}; got {one!r} and {other!r}")


def changes(before: Result, after: Result) -> list[Change]:
    """Of everything that both have measured."""
    found = []
    for workload, name, old, new in _pairs(before, after):
        if name == NAIVE or old["reason"] or new["reason"]:
            continue
        if old["relative"] and new["relative"]:
            found.append(_change(workload, name, "both", old["relative"], new["relative"]))
        if old["graph"] and new["graph"]:
            bounds = [
                {"low": g["q20"], "q50": g["q50"], "high": g["q80"]}
                for g in (old["graph"], new["graph"])
            ]
            found.append(_change(workload, name, "graph", *bounds))
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


def _change(
    workload: str, name: str, clock: str, old: dict[str, float], new: dict[str, float]
) -> Change:
    uncertain = sum((b["high"] - b["low"]) / 2 / b["q50"] for b in (old, new))
    return Change(workload, name, clock, new["q50"] / old["q50"] - 1, uncertain)


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="result file of before")
    parser.add_argument("b", type=Path, metavar="B", help="result file of after")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share; default: 0.08")
    options = parser.parse_args(arguments)
    if not options.threshold > 0:
        parser.error(f"argument --threshold: must be positive, got {options.threshold:g}")
    try:
        before, after = (files.read(path) for path in (options.a, options.b))
        check(before, after)
    except (OSError, ValueError, CompareError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    found, gone = changes(before, after), lost(before, after)
    print(table(found, options.threshold))
    unresolved = [c for c in found if c.verdict(options.threshold) == "unresolved"]
    if unresolved:
        print(
            f"\n{len(unresolved)} of {len(found)} are unresolved: what is uncertain is more than "
            f"{options.threshold:.0%}, so that no such change would be seen. Longer runs see more."
        )
    for line in gone:
        print(f"LOST {line}")
    slower = [c for c in found if c.verdict(options.threshold) == "slower"]
    ours = [c.provider for c in slower] + gone
    failed = any(name.startswith(OURS) for name in ours)
    if failed:
        print("REGRESSION")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
