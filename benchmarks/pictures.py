"""What docs/benchmarks.md shows of frontier and scaling results: pictures, and the same in words.

A picture is an SVG file for each theme. It names the result file that it comes from and a digest of
what is drawn, so that a picture of other numbers is found without comparing drawings, which differ
between versions of matplotlib. Only drawing needs matplotlib.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import environment, tables
from .providers import HAND_DERIVED, NAIVE, OURS, PACKAGES, TF32
from .schema import ErrorCurve, Frontier, Result, Scaling, Workload
from .workloads import COMPILED

FOLDER = Path("pictures")  # beside docs/benchmarks.md
ROUNDING = "rounding alone"

# Colours after Okabe and Ito, which people with any colour vision tell apart, and neither too faint
# on white nor too dark on black. Keys are how names begin, longest first.
_COLOURS = {
    f"{OURS}triton": "#0a6fa8",
    f"{OURS}cuda": "#7a63d9",
    OURS: "#1a86cf",
    TF32: "#8e5bd0",
    f"{NAIVE} ": "#c0508f",
    NAIVE: "#d5600a",
    HAND_DERIVED: "#10926b",
    **dict.fromkeys((COMPILED, *PACKAGES), "#a97b00"),
    "": "#7d8590",
}
# Ink for GitHub's backgrounds.
THEMES = {"light": "#1f2328", "dark": "#e6edf3"}
_INK = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
_STYLE: Any = {
    **dict.fromkeys((f"axes.spines.{side}" for side in ("left", "right", "top", "bottom")), False),
    **dict.fromkeys((f"{axis}tick.{kind}.size" for axis in "xy" for kind in ("major", "minor")), 0),
    **{f"{text}size": 8 for text in ("font.", "figure.label", "axes.label", "legend.font")},
    **{"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.grid": True, "grid.color": "#8c959f50"},
    **{"axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"legend.frameon": False, "legend.labelcolor": "linecolor", "svg.fonttype": "path"},
}
_AXES = {"rows": "rows N", "width": "width D", "layers": "layers L"}


class NoMatplotlibError(Exception):
    """Why nothing can be drawn."""


class Line(NamedTuple):
    """Low, middle and high over x; None is not finite. ``wrong`` are places that get a cross."""

    name: str
    x: Sequence[float | None]
    points: Sequence[tuple[float | None, ...]]
    wrong: Sequence[int] = ()
    dotted: bool = False

    def draw(self, axes: Any) -> None:
        low, middle, high = (
            [math.nan if y is None else y for y in side] for side in zip(*self.points, strict=True)
        )
        colour, ours = _colour(self.name), self.name.startswith(OURS)
        style: Any = {"color": colour, "zorder": 5 if ours else 3, "lw": 2.6 if ours else 1.3}
        if self.dotted:
            axes.plot(self.x, middle, ":", **style)
        elif self.name == ROUNDING:
            axes.plot(self.x, middle, "--", **style, label=self.name)
        else:
            axes.plot(self.x, middle, "o-", **style, markersize=3, label=self.name)
            axes.fill_between(self.x, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
        style |= {"markersize": 8, "markeredgewidth": 1.8, "clip_on": False}
        for i, y in enumerate(middle):
            if math.isnan(y):
                axes.plot(self.x[i], 1, "x", **style, transform=axes.get_xaxis_transform())
            elif i in self.wrong:
                axes.plot(self.x[i], y, "x", **style)


def _colour(name: str) -> str:
    return next(colour for prefix, colour in _COLOURS.items() if name.startswith(prefix))


@dataclass(frozen=True)
class Picture:
    """Panels of lines, by title, what they show in words, and a ``short`` name for links.

    Pictures of errors have two columns, and each panel names its lines. In those of times, the
    last panel does.
    """

    stem: str
    short: str
    title: str
    words: str
    panels: Mapping[str, Sequence[Line]]
    x_labels: Sequence[str]
    y_label: str
    note: str
    errors: bool

    @property
    def alt(self) -> str:
        return f"{self.title}. {self.words}"

    def file(self, theme: str) -> str:
        return f"{self.stem}-{theme}.svg"

    def digest(self, theme: str) -> str:
        """A digest of what is drawn."""
        drawn = json.dumps([theme, self.panels, self.x_labels, self.y_label, self.note])
        return hashlib.sha256(drawn.encode()).hexdigest()

    def is_current(self, folder: Path, theme: str) -> bool:
        """Whether the file in the folder shows this."""
        path = folder / self.file(theme)
        return path.exists() and f">{self.digest(theme)}<" in path.read_text(encoding="utf-8")

    def write(self, folder: Path, theme: str) -> Path:
        """Draw it.

        Raises:
            NoMatplotlibError: it cannot be drawn here.
        """
        try:
            import matplotlib as mpl
            from matplotlib.figure import Figure
        except ImportError as error:
            raise NoMatplotlibError(
                f"pictures are drawn by matplotlib, which cannot be imported: {error}"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file(theme)
        ink: Any = dict.fromkeys(_INK, THEMES[theme])
        about = {"Title": self.title, "Identifier": self.digest(theme), "Date": None}
        # No date and no random names: the same numbers make the same file.
        with mpl.rc_context({**_STYLE, **ink, "svg.hashsalt": self.stem}):
            figure = Figure(layout="constrained")
            self.draw(figure)
            figure.savefig(path, transparent=True, metadata=about)
        return path

    def draw(self, figure: Any) -> None:
        columns = 2 if self.errors else len(self.panels)
        rows = -(-len(self.panels) // columns)
        figure.set_size_inches(8.4, 3 * rows)
        figure.supxlabel(self.note, x=0.01, ha="left")
        panels = figure.subplots(rows, columns, sharey="row", squeeze=False)
        for axes, (title, lines), label in zip(
            panels.flat, self.panels.items(), self.x_labels, strict=True
        ):
            for line in lines:
                line.draw(axes)
            axes.set(title=title, xlabel=label, yscale="log")
            if self.errors:
                axes.set_xscale("log")
                axes.invert_xaxis()
                _names([axes])
            else:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_major_formatter("{x:g}")
        for axes in panels.flat if self.errors else ():
            limits = axes.get_ylim()
            axes.axhspan(1, max(limits[1], 1), color=_colour(NAIVE), alpha=0.15, zorder=0)
            axes.set_ylim(limits)
        if not self.errors:
            _names(panels.flat)
        for axes in panels[:, 0]:
            axes.set_ylabel(self.y_label)

    def markup(self) -> str:
        """HTML that shows the one that suits the reader's theme."""
        return (
            "<picture>\n"
            f'<source media="(prefers-color-scheme: dark)" srcset="{self.link("dark")}">\n'
            f'<img src="{self.link("light")}" alt="{html.escape(self.alt)}" width="100%">\n'
            "</picture>"
        )

    def link(self, theme: str) -> str:
        return (FOLDER / self.file(theme)).as_posix()


def _names(panels: Iterable[Any]) -> None:
    """A legend of these panels' lines beside the last one, in the order of their ends."""
    *_, last = panels = [*panels]
    lines = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    ends = {name: float(line.get_ydata()[-1]) for name, line in lines.items()}
    order = sorted(ends, key=lambda name: -math.inf if math.isnan(ends[name]) else -ends[name])
    handles = [lines[name] for name in order]
    for text in last.legend(handles, order, loc="center left", bbox_to_anchor=(1, 0.5)).get_texts():
        text.set_fontweight("bold" if text.get_text().startswith(OURS) else "normal")


def of(result: Result) -> list[Picture]:
    """The pictures of a result; none without curves."""
    if isinstance(result, Frontier):
        shapes = dict.fromkeys((curve.rows, curve.width) for curve in result.curves)
        return [_frontier(result, *shape) for shape in shapes]
    return [_scaling(result)] if isinstance(result, Scaling) else []


def stale(
    results: Iterable[Result], folder: Path, everything: bool = False
) -> Iterator[tuple[Picture, str]]:
    """Pictures and themes that are missing there or show something else; or all of them."""
    for picture in (picture for result in results for picture in of(result)):
        for theme in THEMES:
            if everything or not picture.is_current(folder, theme):
                yield picture, theme


def summary(result: Frontier | Scaling) -> str:
    """The first picture, links to the others, and what they lack."""
    shown, *others = of(result)
    caption = tables.caption(result)
    if others:
        links = (f"[{other.short}]({other.link('light')})" for other in others)
        caption += f" The same for {', '.join(links)}."
    return "\n\n".join([shown.markup(), caption, *missing(result)])


def missing(result: Result) -> list[str]:
    """A paragraph, or none: what failed or took too long, and is not in the pictures."""
    reasons: list[tuple[str, str | None]] = []
    if isinstance(result, Frontier):
        for curve in result.curves:
            label = f"{_kind(curve)}, {curve.rows} x {curve.width}"
            reasons += [(f"{name}, {label}", e.reason) for name, e in curve.results.items()]
    elif isinstance(result, Scaling):
        reasons += [(w.shape, w.reason) for w in result.workloads]
        for w in result.workloads:
            reasons += [(f"{name}, {w.shape}", o.reason) for name, o in w.results.items()]
    # A reason is the same for students as they are and rotated.
    return tables.not_measured(f"{what}: {reason}" for what, reason in reasons if reason)


def _kind(curve: ErrorCurve) -> str:
    return f"{curve.measure.removeprefix('cka_')}, {curve.dtype}"


def _frontier(result: Frontier, rows: int, width: int) -> Picture:
    """A panel for each dtype and kind of CKA; in words, the errors at its last point."""
    panels: dict[str, list[Line]] = {}
    words = []
    for curve in sorted(result.curves, key=lambda curve: curve.rotated):
        if (curve.rows, curve.width) != (rows, width):
            continue
        errors = {name: entry.errors for name, entry in curve.results.items() if entry.errors}
        x = [distance.median for distance in curve.distances]
        named = errors if curve.rotated else {ROUNDING: curve.rounding, **errors}
        panels.setdefault(_kind(curve), []).extend(
            Line(name, x, [(e.min, e.median, e.max) for e in spreads], dotted=curve.rotated)
            for name, spreads in named.items()
        )
        if not curve.rotated:
            ends = (f"{name} {_in_words(spreads[-1].median)}" for name, spreads in errors.items())
            words.append(f"{_kind(curve)}, at 1 - CKA = {_in_words(x[-1])}: {', '.join(ends)}.")
    note = (
        f"Features {rows} x {width}. Solid: student near its teacher, median and range of "
        f"{result.pairs} pairs. Dotted: the same, rotated. Shaded: off by the whole gradient."
    )
    middles = (middle for ls in panels.values() for line in ls for _, middle, _ in line.points)
    device = result.environment.device
    return Picture(
        f"frontier-{environment.slug(device)}-{rows}x{width}",
        f"{rows} x {width}",
        f"Error of the gradient of linear CKA near similarity 1, {rows} x {width}, {device}",
        " ".join(words),
        panels,
        ["1 - CKA; to the right, nearer to the teacher"] * len(panels),
        "relative error of the gradient",
        note + (" Crosses: NaN or infinite." if None in middles else ""),
        errors=True,
    )


def _in_words(error: float | None) -> str:
    return f"{error:.0f}" if error is not None and error >= 1 else tables.error_text(error)


def _scaling(result: Scaling) -> Picture:
    """A panel for each size that grows; in words, the times at its end."""
    panels: dict[str, list[Line]] = {}
    words = []
    for curve in result.curves:
        along, workloads = curve.along, [result.workloads[i] for i in curve.workloads]
        names = tables.names_of(w.results for w in workloads)
        lines = [line for line in (_times(name, along, workloads) for name in names) if line.x]
        panels[_fixed(along, workloads[0])] = lines
        end = max((line.x[-1] or 0 for line in lines), default=0)
        ends = ", ".join(
            f"{line.name} {tables.milliseconds((line.points[-1][1] or 0) / 1e3)}"
            for line in lines
            if line.x[-1] == end
        )
        words.append(f"At {_AXES[along]} = {end}: {ends}.")
    note = "Medians of interleaved calls; bands from the 0.2 to the 0.8 quantile."
    if any(line.wrong for lines in panels.values() for line in lines):
        note += " Crosses: a wrong value or gradient."
    device = result.environment.device
    return Picture(
        f"scaling-{environment.slug(device)}",
        device,
        f"Time of linear CKA, forward and backward, as features grow, {device}",
        " ".join(words),
        panels,
        [_AXES[curve.along] for curve in result.curves],
        "ms",
        note,
        errors=False,
    )


def _times(name: str, along: str, workloads: Sequence[Workload]) -> Line:
    """Milliseconds; what was not measured has no point."""
    measured = [w for w in workloads if name in w.results and not w.results[name].reason]
    outcomes = [w.results[name] for w in measured]
    seconds = [outcome.seconds["both"] for outcome in outcomes]
    points = [(1e3 * s.q20, 1e3 * s.q50, 1e3 * s.q80) for s in seconds]
    wrong = [i for i, outcome in enumerate(outcomes) if outcome.wrong]
    return Line(name, [getattr(w, along) for w in measured], points, wrong)


def _fixed(along: str, workload: Workload) -> str:
    """The sizes that do not grow."""
    rows = "N" if along == "rows" else workload.rows
    width = "D" if along == "width" else workload.width
    return f"{'L x ' if along == 'layers' else ''}{rows} x {width} {workload.dtype}"
