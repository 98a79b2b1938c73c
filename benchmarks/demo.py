"""The demo's result file as a Markdown table: a row a method of finetuning, mean and deviation."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .tables import markdown

# Field, title and decimals.
_COLUMNS = (
    ("new_accuracy", "new task, %", 1),
    ("old_accuracy", "old task kept, %", 1),
    ("similarity", "similarity to pretrained", 2),
    ("step_ms", "ms a step", 1),
)


def section(record: dict[str, Any]) -> str:
    """The table, how many seeds there were, and where and with what they were run."""
    from examples.digits.methods import Plan  # needs scikit-learn, which no benchmark needs

    plans = defaultdict(list)
    for run in record["runs"]:
        plans[Plan(run["method"], run["weight"], run["rate"])].append(run)
    rows = [
        [str(plan), *(cell(runs, field, decimals) for field, _, decimals in _COLUMNS)]
        for plan, runs in plans.items()
    ]
    header = ["", *(title for _, title, _ in _COLUMNS)]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{markdown(header, rows)}\n\n"
        f"Mean ± standard deviation over {len({run['seed'] for run in record['runs']})} seeds; "
        f"{record['hardware']}; {versions}; commit {record['commit'][:12]}; "
        f"{record['seconds']:.0f} s in all."
    )


def cell(runs: Sequence[dict[str, Any]], field: str, decimals: int) -> str:
    """Mean and deviation; the mean alone of times, which do not depend on seeds."""
    values = [run[field] for run in runs]
    if None in values:
        return "-"
    mean = f"{statistics.fmean(values):.{decimals}f}"
    if field == "step_ms" or len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}"
