"""Records of runs as Markdown tables: mean and deviation over seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.tables import markdown

from .methods import Plan
from .runs import Run

# Field, title and decimals.
_COLUMNS = (
    ("new_accuracy", "new task, %", 1),
    ("old_accuracy", "old task kept, %", 1),
    ("similarity", "similarity to pretrained", 2),
    ("step_ms", "ms a step", 1),
)


def demo(record: dict[str, Any]) -> str:
    """The demo's table, a row a method of finetuning, and its caption."""
    plans = defaultdict(list)
    for run in record["runs"]:
        plans[Plan(run["method"], run["weight"], run["rate"])].append(run)
    rows = [
        [str(plan), *(cell(runs, field, decimals) for field, _, decimals in _COLUMNS)]
        for plan, runs in plans.items()
    ]
    header = ["", *(title for _, title, _ in _COLUMNS)]
    return f"{markdown(header, rows)}\n\n{caption(record)}"


def caption(record: dict[str, Any]) -> str:
    """How many seeds there were, and where and with what they were run."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Mean ± standard deviation over {len({run['seed'] for run in record['runs']})} seeds; "
        f"{record['hardware']}; {versions}; commit {record['commit'][:12]}; "
        f"{record['seconds']:.0f} s in all."
    )


def cell(runs: Sequence[Run], field: str, decimals: int) -> str:
    """Mean and deviation; the mean alone of times, which do not depend on seeds."""
    values = [run[field] for run in runs]
    if any(value is None or math.isnan(value) for value in values):
        return "-"
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if field == "step_ms" or len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}"
