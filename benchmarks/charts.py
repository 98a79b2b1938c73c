"""Charts of lines on log axes: what is drawn, as plain data, and how, in a light and a dark theme.

What a chart shows can be compared and put into words without matplotlib, which only drawing needs.
Every line has its name at its end, in its colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .providers import HAND_DERIVED, NAIVE, OURS, PACKAGES, TF32
from .workloads import COMPILED

# Okabe and Ito's colours, which people with any colour vision tell apart; those that are too faint
# or too dark on a background are darkened or lightened. By how names begin, longest first.
_COLOURS = {
    f"{OURS}triton": ("#004c78", "#a6dbff"),
    f"{OURS}cuda": ("#3d2f9e", "#b9acff"),
    OURS: ("#0072b2", "#56b4e9"),
    TF32: ("#6f42c1", "#c4a7f5"),
    f"{NAIVE} ": ("#a04a80", "#e694c1"),
    NAIVE: ("#d55e00", "#ff8a3d"),
    HAND_DERIVED: ("#00805e", "#2cc79b"),
    COMPILED: ("#a87000", "#f0c03f"),
    **dict.fromkeys(PACKAGES, ("#a87000", "#f0c03f")),
    "": ("#6e7781", "#9aa4af"),
}
# Inches: about 800 pixels wide, as a README is shown, and room for what stands around the axes.
_WIDTH, _HEIGHT, _LEFT, _NAMES, _GAP, _TITLE, _BELOW = 8.4, 2.1, 0.62, 1.42, 0.12, 0.3, 0.5
_NAME_GAP = 11.0  # points between two names


@dataclass(frozen=True)
class Line:
    """Numbers over ``x``, with a band from ``low`` to ``high``; None is beyond what is shown.

    ``wrong`` are places that get a cross, a dotted line is a second one of the same name, and a
    limit is nobody's measurement, but what theirs are held against.
    """

    name: str
    x: Sequence[float]
    low: Sequence[float | None]
    middle: Sequence[float | None]
    high: Sequence[float | None]
    dotted: bool = False
    limit: bool = False
    wrong: Sequence[int] = ()


@dataclass(frozen=True)
class Panel:
    """Some lines; ``falling``: x falls from left to right; from ``useless`` on it is shaded."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    falling: bool = False
    useless: float | None = None


@dataclass(frozen=True)
class Chart:
    """Panels in rows of ``columns``; those of a row share the y axis.

    ``named``: every panel has the names of its lines beside it, not only the last of a row.
    """

    panels: Sequence[Panel]
    columns: int
    named: bool
    note: str


@dataclass(frozen=True)
class Theme:
    index: int
    background: str
    ink: str
    grid: str
    shade: str


# GitHub's backgrounds.
THEMES = {
    "light": Theme(0, "#ffffff", "#1f2328", "#dfe3e8", "#f7e4dc"),
    "dark": Theme(1, "#0d1117", "#e6edf3", "#2b3138", "#38231c"),
}


class NoMatplotlibError(Exception):
    """Why nothing can be drawn."""


def save(chart: Chart, theme: Theme, path: Path, salt: str, metadata: dict[str, str]) -> None:
    """An SVG file.

    Raises:
        NoMatplotlibError: it cannot be drawn here.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlibError(
            f"pictures are drawn by matplotlib, which cannot be imported: {error}"
        ) from error
    # No date and no random names: the same numbers make the same file.
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "path"}):
        figure = draw(chart, theme)
        figure.savefig(path, facecolor="auto", metadata={**metadata, "Date": None})


def draw(chart: Chart, theme: Theme) -> Any:
    """A matplotlib figure."""
    from matplotlib.figure import Figure

    rows = [chart.panels[i : i + chart.columns] for i in range(0, len(chart.panels), chart.columns)]
    named = chart.columns if chart.named else 1
    width = _WIDTH - _LEFT - named * _NAMES - (chart.columns - 1) * _GAP
    width /= chart.columns
    row_height = _TITLE + _HEIGHT + _BELOW
    height = len(rows) * row_height + 0.15
    figure = Figure(figsize=(_WIDTH, height), facecolor=theme.background)
    for i, row in enumerate(rows):
        limits = _limits(row)
        bottom = height - (i + 1) * row_height + _BELOW
        left = _LEFT
        for j, panel in enumerate(row):
            box = (left / _WIDTH, bottom / height, width / _WIDTH, _HEIGHT / height)
            axes = figure.add_axes(box, facecolor=theme.background)
            _draw_panel(axes, panel, theme, limits, first=j == 0)
            left += width + _GAP
            if chart.named or j == len(row) - 1:
                _write_names(axes, [panel] if chart.named else row, theme, limits)
                left += _NAMES
    figure.text(_LEFT / _WIDTH, 0.06 / height, chart.note, fontsize=8, color=theme.ink)
    return figure


def spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Places at least ``gap`` apart between 0 and ``top``, as near as can be to rising ones.

    Those that would overlap are moved together, about their mean.
    """
    groups: list[tuple[float, int]] = []
    for i, place in enumerate(wanted):
        mean, count = place - i * gap, 1
        while groups and groups[-1][0] > mean:
            before, size = groups.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        groups.append((mean, count))
    flat = [mean for mean, count in groups for _ in range(count)]
    highest = max(0.0, top - (len(flat) - 1) * gap)
    return [min(max(place, 0.0), highest) + i * gap for i, place in enumerate(flat)]


def _colour(name: str, theme: Theme) -> str:
    return next(c for prefix, c in _COLOURS.items() if name.startswith(prefix))[theme.index]


def _or(number: float | None, otherwise: float) -> float:
    return otherwise if number is None else number


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """Of the y axis: all that is drawn, and some room."""
    numbers = [y for panel in panels for line in panel.lines for y in (*line.low, *line.high) if y]
    return min(numbers, default=0.1) / 1.6, max(numbers, default=10.0) * 1.6


def _draw_panel(
    axes: Any, panel: Panel, theme: Theme, limits: tuple[float, float], first: bool
) -> None:
    axes.set(xscale="log", yscale="log", ylim=limits)
    for i, line in enumerate(panel.lines):
        _draw_line(axes, line, theme, order=i, top=limits[1])
    if panel.useless is not None and panel.useless < limits[1]:
        axes.axhspan(panel.useless, limits[1], color=theme.shade, linewidth=0, zorder=0)
        place = {"xy": (0, 1), "xytext": (4, -4), "textcoords": "offset points"}
        axes.annotate(
            "useless: an error as large as the gradient",
            **place,
            xycoords="axes fraction",
            va="top",
            fontsize=7,
            color=theme.ink,
            zorder=9,
        )
    axes.set_title(panel.title, loc="left", fontsize=9, color=theme.ink, fontweight="bold")
    axes.set_xlabel(panel.x_label, fontsize=8, color=theme.ink, labelpad=2)
    if first:
        axes.set_ylabel(panel.y_label, fontsize=8, color=theme.ink, labelpad=2)
    _draw_ticks(axes, panel, theme, first)


def _draw_line(axes: Any, line: Line, theme: Theme, order: int, top: float) -> None:
    ours = line.name.startswith(OURS)
    colour = _colour(line.name, theme)
    known = [i for i, y in enumerate(line.middle) if y is not None]
    style = {"color": colour, "zorder": 5 if ours else 3 + order / 100}
    points = [line.x[i] for i in known], [line.middle[i] for i in known]
    if line.dotted:
        axes.plot(*points, ":", **style, linewidth=1.7 if ours else 1.3)
    elif line.limit:
        axes.plot(*points, "--", **style, linewidth=1.0, dashes=(4, 2))
    else:
        width, size = (2.6, 3.4) if ours else (1.3, 2.4)
        axes.plot(*points, "o-", **style, linewidth=width, markersize=size)
        band = [i for i in known if line.low[i] is not None and line.high[i] is not None]
        low, high = ([side[i] for i in band] for side in (line.low, line.high))
        places = [line.x[i] for i in band]
        axes.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
    # What is wrong, and at the upper edge what is NaN or infinite.
    crosses = [(line.x[i], _or(line.middle[i], top)) for i in line.wrong]
    crosses += [(x, top) for x, y in zip(line.x, line.middle, strict=True) if y is None]
    if crosses:
        axes.plot(
            *zip(*crosses, strict=True),
            "x",
            **style,
            markersize=8,
            markeredgewidth=1.8,
            clip_on=False,
        )


def _draw_ticks(axes: Any, panel: Panel, theme: Theme, first: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    if panel.falling:
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.invert_xaxis()
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        places = sorted({x for line in panel.lines for x in line.x})
        axes.set_xticks(places[:: 2 if len(places) > 5 else 1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if not first:
        axes.yaxis.set_major_formatter(NullFormatter())
    axes.tick_params(labelsize=8, colors=theme.ink, length=0, pad=3)
    axes.grid(color=theme.grid, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_names(
    axes: Any, panels: Sequence[Panel], theme: Theme, limits: tuple[float, float]
) -> None:
    """The names of these panels' lines beside the last one, moved where two would overlap."""
    lines = {
        line.name: (line, panel)
        for panel in panels
        for line in panel.lines
        if not line.dotted and line.x
    }
    height = 72 * _HEIGHT
    low, high = (math.log(limit) for limit in limits)
    ends = {name: _or(line.middle[-1], limits[1]) for name, (line, _) in lines.items()}
    names = sorted(ends, key=lambda name: ends[name])
    wanted = [(math.log(ends[name]) - low) / (high - low) * height for name in names]
    at_ends = [line.x[-1] for line, panel in lines.values() if panel is panels[-1]]
    ends_at = min(at_ends) if panels[-1].falling else max(at_ends)
    left = 1 + 0.13 / (axes.get_position().width * _WIDTH)
    for name, place in zip(names, spread(wanted, _NAME_GAP, height), strict=True):
        (line, panel), colour = lines[name], _colour(name, theme)
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            xy=(line.x[-1], ends[name]),
            xytext=(left, place / height),
            textcoords="axes fraction",
            fontsize=8.5,
            fontweight="bold" if name.startswith(OURS) else "normal",
            color=colour,
            va="center",
            annotation_clip=False,
            # From the line's last point, if that is where the panel ends.
            arrowprops=arrow if panel is panels[-1] and line.x[-1] == ends_at else None,
        )
