"""What the pictures of results share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .finetune_digits import GREY
from .runs import Run

_HOW: dict[str, Any] = {"mec": "white", "ms": 7, "lw": 1.8, "zorder": 3}
_HOW |= {"elinewidth": 1, "capsize": 2}


def begin(figure: Figure, title: str, words: str, left: float) -> None:
    """The title, and a line of explanation below it."""
    figure.suptitle(title, x=left, ha="left", y=0.985, weight="bold", fontsize=13)
    figure.text(left, 0.935, words, fontsize=9.5, color=GREY, va="top")


def plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def statistics(runs: Sequence[Run], field: str) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 of a single run."""
    values = [run[field] for run in runs]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def line(
    axes: Axes,
    x: Sequence[float],
    groups: Sequence[Sequence[Run]],
    field: str,
    colour: str,
    marker: str = "o-",
    label: str = "_",
) -> None:
    """The means of groups of runs, joined, a standard deviation to both sides."""
    mean, deviation = np.array([statistics(runs, field) for runs in groups]).T
    axes.errorbar(x, mean, deviation, fmt=marker, label=label, color=colour, **_HOW)


def row(axes: Axes, y: float, runs: Sequence[Run], field: str, colour: str) -> None:
    """A mean at a height, a standard deviation to both sides."""
    mean, deviation = statistics(runs, field)
    axes.errorbar(mean, y, xerr=deviation, fmt="o", color=colour, **_HOW)


def level(axes: Axes, runs: Sequence[Run], field: str, style: str) -> None:
    """A line to compare with; none where nothing was measured."""
    if all(run[field] is not None for run in runs):
        axes.axhline(statistics(runs, field)[0], color=GREY, lw=1.2, ls=style, zorder=1)
