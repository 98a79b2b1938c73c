"""Pictures of frontier and scaling results in docs/benchmarks.md, and the same in words.

A picture is an SVG file with a digest of what is drawn, so that a picture of other numbers is found
without comparing drawings, which differ between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import environment, tables
from .providers import HALF, HAND_DERIVED, NAIVE, OURS, PACKAGES, WIDE
from .schema import ErrorCurve, Frontier, Result, Scaling, Workload
from .workloads import COMPILED

ROUNDING = "rounding alone"

# Colours after Okabe and Ito, which people with any colour vision tell apart, and neither too faint
# on white nor too dark on black. Keys are how names begin, longest first.
_COLOURS = {
    **{f"{OURS}triton": "#0a6fa8", f"{OURS}cuda": "#7a63d9", OURS: "#1a86cf"},
    **{WIDE: "#c0508f", HALF: "#8d6b55", NAIVE: "#d5600a", HAND_DERIVED: "#10926b"},
    **{COMPILED: "#a97b00", **dict(zip(PACKAGES, ("#a97b00", "#708c1c"), strict=True))},
    "": "#7d8590",
}
# Ink that is legible on GitHub's light and dark backgrounds.
_INK = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
_STYLE: Any = {
    **dict.fromkeys(_INK, "#768089"),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")), False),
    **{"font.size": 8, "figure.labelsize": 8, "axes.titlesize": 9, "axes.titleweight": "bold"},
    **{"axes.titlelocation": "left", "axes.grid": True, "grid.color": "#8c959f50"},
    **{"legend.frameon": False, "legend.labelcolor": "linecolor"},
    **{"xtick.minor.size": 0, "ytick.minor.size": 0},
}
_AXES = {"rows": "rows N", "width": "width D", "layers": "layers L"}


@dataclass
class Line:
    """Points are x, low, middle and high; ``crosses`` are the x of those that are wrong."""

    name: str
    points: list[tuple[float, ...]]
    crosses: list[float]
    dotted: bool = False


@dataclass
class Picture:
    """Lines by the title and the x axis of their panel."""

    link: str  # from docs
    title: str
    y_label: str
    note: str
    panels: Mapping[tuple[str, str], list[Line]]
    errors: bool

    @property
    def alt(self) -> str:
        """The title and the numbers at the end of each panel."""
        sentences = [self.title]
        for (title, axis), lines in self.panels.items():
            ends = {line.name: line.points[-1] for line in lines if not line.dotted}
            last = (min if self.errors else max)(x for x, *_ in ends.values())
            values = ", ".join(f"{name} {p[2]:.3g}" for name, p in ends.items() if p[0] == last)
            sentences.append(f"{title}, at {axis.split(';')[0]} = {last:.5g}: {values}")
        return ". ".join(sentences) + "."

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def is_current(self, path: Path) -> bool:
        return path.exists() and f">{self.digest}<" in path.read_text(encoding="utf-8")

    def write(self, path: Path) -> None:
        import matplotlib as mpl  # which is not needed to check pictures

        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Title": self.title, "Identifier": self.digest, "Date": None}
        # No date and no random names: the same numbers make the same file.
        with mpl.rc_context({**_STYLE, "svg.hashsalt": self.link}):
            draw(self).savefig(path, transparent=True, metadata=about)


def draw(picture: Picture) -> Any:
    """The picture as a figure of matplotlib."""
    from matplotlib.figure import Figure

    rows, columns = (2, 2) if picture.errors else (1, 3)
    figure = Figure((8.4, 3 * rows), layout="constrained")
    figure.supxlabel(picture.note, x=0.01, ha="left")
    figure.supylabel(picture.y_label)
    panels = figure.subplots(rows, columns, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for axes, ((title, axis), lines) in zip(panels.flat, picture.panels.items(), strict=True):
        axes.set(title=title, xlabel=axis, yscale="log")
        for line in lines:
            handles.setdefault(line.name, _draw(axes, line))
        if picture.errors:
            axes.set_xscale("log")
            axes.invert_xaxis()
        else:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
    for axes in panels.flat if picture.errors else ():
        low, high = axes.get_ylim()
        axes.axhspan(1, 1e9, color=_colour(NAIVE), alpha=0.15, zorder=0)
        axes.set_ylim(low, high)
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    return figure


def _draw(axes: Any, line: Line) -> Any:
    x, low, middle, high = zip(*line.points, strict=True)
    colour, ours = _colour(line.name), line.name.startswith(OURS)
    style: Any = {"color": colour, "zorder": 5 if ours else 3, "lw": 2.6 if ours else 1.3}
    for top in line.crosses:
        axes.plot(top, 1, "x", **style, transform=axes.get_xaxis_transform(), clip_on=False)
    if not line.dotted:
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
    marks = ":" if line.dotted else "--" if line.name == ROUNDING else "o-"
    return axes.plot(x, middle, marks, **style, markersize=3)[0]


def _colour(name: str) -> str:
    return next(colour for prefix, colour in _COLOURS.items() if name.startswith(prefix))


def of(result: Result) -> list[Picture]:
    """The pictures of a result; none without curves."""
    if isinstance(result, Frontier):
        shapes = dict.fromkeys((curve.rows, curve.width) for curve in result.curves)
        return [_frontier(result, *shape) for shape in shapes]
    return [_scaling(result)] if isinstance(result, Scaling) else []


def summary(result: Frontier | Scaling) -> str:
    """The first picture, links to the others, and what failed or took too long for them."""
    shown, *others = of(result)
    links = ", ".join(f"[{other.link.split('-')[-1][:-4]}]({other.link})" for other in others)
    caption = tables.caption(result) + (f" The same for {links}." if links else "")
    parts: list[Any] = result.curves if isinstance(result, Frontier) else result.workloads
    # A reason is the same for students as they are and rotated.
    missing = tables.not_measured(r for part in parts for r in tables.reasons(label(part), part))
    return "\n\n".join([f"![{shown.alt}]({shown.link})", caption, *missing])


def label(part: ErrorCurve | Workload) -> str:
    if isinstance(part, Workload):
        return part.shape
    return f"{_kind(part)}, {part.rows} x {part.width}"


def _kind(curve: ErrorCurve) -> str:
    return f"{curve.measure.removeprefix('cka_')}, {curve.dtype}"


def _frontier(result: Frontier, rows: int, width: int) -> Picture:
    """A panel for each dtype and kind of CKA."""
    panels = defaultdict(list)
    for curve in result.curves:
        if (curve.rows, curve.width) != (rows, width):
            continue
        x = [distance.median or 0.0 for distance in curve.distances]
        errors = {} if curve.rotated else {ROUNDING: curve.rounding}
        errors |= {name: outcome.errors for name, outcome in curve.results.items()}
        for name, spreads in errors.items():
            numbers = [[math.nan if y is None else y for y in vars(e).values()] for e in spreads]
            points = [(at, *spread) for at, spread in zip(x, numbers, strict=False)]
            crosses = [at for at, _, middle, _ in points if math.isnan(middle)]
            if points:
                axis = "1 - CKA; to the right, nearer to the teacher"
                line = Line(name, points, crosses, dotted=curve.rotated)
                panels[_kind(curve), axis].append(line)
    device = result.environment.device
    return Picture(
        link=f"pictures/frontier-{environment.slug(device)}-{rows}x{width}.svg",
        title=f"Error of the gradient of linear CKA near similarity 1, {rows} x {width}, {device}",
        y_label="relative error of the gradient",
        note=f"Solid: student near its teacher, median and range of {result.pairs} pairs. Dotted: "
        "the same, rotated. Crosses: NaN or infinite.",
        panels=panels,
        errors=True,
    )


def _scaling(result: Scaling) -> Picture:
    """A panel for each size that grows."""
    panels = defaultdict(list)
    for curve in result.curves:
        workloads = [result.workloads[i] for i in curve.workloads]
        axis = _AXES[curve.along]
        sizes = {**vars(workloads[0]), curve.along: axis[-1]}
        layers = "L x " if curve.along == "layers" else ""
        title = f"{layers}{sizes['rows']} x {sizes['width']} {sizes['dtype']}"
        for name in tables.names_of(w.results for w in workloads):
            line = Line(name, [], [])
            for w in workloads:
                outcome = w.results.get(name)
                if outcome and outcome.reason is None:
                    x, seconds = float(getattr(w, curve.along)), outcome.seconds["both"]
                    line.points.append((x, *(1e3 * s for s in vars(seconds).values())))
                    line.crosses += [x] if outcome.wrong else []
            if line.points:
                panels[title, axis].append(line)
    device = result.environment.device
    return Picture(
        link=f"pictures/scaling-{environment.slug(device)}.svg",
        title=f"Milliseconds of linear CKA, forward and backward, as features grow, {device}",
        y_label="ms",
        note="Medians of interleaved calls; bands from the 0.2 to the 0.8 quantile. Crosses: wrong "
        "value or gradient.",
        panels=panels,
        errors=False,
    )
