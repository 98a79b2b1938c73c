"""Parts that the pictures of results share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .methods import GREY
from .runs import Run

_STYLE: dict[str, Any] = {"mec": "white", "ms": 7, "lw": 1.8, "zorder": 3}
_STYLE |= {"elinewidth": 1, "capsize": 2}


def add_title(figure: Figure, title: str, explanation: str, left: float) -> None:
    """Add a title and a line of explanation below it."""
    figure.suptitle(title, x=left, ha="left", y=0.985, weight="bold", fontsize=13)
    figure.text(left, 0.935, explanation, fontsize=9.5, color=GREY, va="top")


def simplify_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def mean_and_deviation(runs: Sequence[Run], field: str) -> tuple[float, float]:
    """Mean and standard deviation; the latter is 0 for a single run."""
    values = [run[field] for run in runs]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw_line(
    axes: Axes,
    x: Sequence[float],
    groups: Sequence[Sequence[Run]],
    field: str,
    colour: str,
    marker: str = "o-",
    label: str = "_",
) -> None:
    """Join the means of groups of runs, with bars of one standard deviation to either side."""
    mean, deviation = np.array([mean_and_deviation(runs, field) for runs in groups]).T
    axes.errorbar(x, mean, deviation, fmt=marker, label=label, color=colour, **_STYLE)


def draw_row(axes: Axes, y: float, runs: Sequence[Run], field: str, colour: str) -> None:
    """Draw a mean at height ``y``, with one standard deviation to either side."""
    mean, deviation = mean_and_deviation(runs, field)
    axes.errorbar(mean, y, xerr=deviation, fmt="o", color=colour, **_STYLE)


def draw_level(axes: Axes, runs: Sequence[Run], field: str, style: str) -> None:
    """Draw a horizontal line for comparison, unless the field was not measured."""
    if all(run[field] is not None for run in runs):
        mean, _ = mean_and_deviation(runs, field)
        axes.axhline(mean, color=GREY, lw=1.2, ls=style, zorder=1)
