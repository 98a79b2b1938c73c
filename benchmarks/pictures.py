"""What docs/benchmarks.md shows of frontier and scaling results: pictures, and the same in words.

A picture is an SVG file for each theme. Its metadata name the result file that it comes from and a
digest of what is drawn, so that one of other numbers is found without comparing drawings, which
differ between versions of matplotlib.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import charts, environment, tables
from .charts import Chart, Line, Panel
from .files import Result
from .schema import FRONTIER, SCALING

FOLDER = Path("pictures")  # beside docs/benchmarks.md
ROUNDING = "rounding alone"
_DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"


@dataclass(frozen=True)
class Picture:
    """A chart of a result, and what it shows in words: ``alt``, and a ``short`` name for links."""

    stem: str
    short: str
    source: str
    title: str
    alt: str
    chart: Chart

    def file(self, theme: str) -> str:
        return f"{self.stem}-{theme}.svg"

    def digest(self, theme: str) -> str:
        """Of all that is drawn."""
        drawn = json.dumps([theme, dataclasses.asdict(self.chart)], sort_keys=True)
        return hashlib.sha256(drawn.encode()).hexdigest()

    def is_current(self, folder: Path, theme: str) -> bool:
        """Whether the file there is of this result and shows this."""
        try:
            root = ElementTree.parse(folder / self.file(theme)).getroot()
        except (OSError, ElementTree.ParseError):
            return False
        found = [root.findtext(f".//{_DUBLIN_CORE}{key}") for key in ("source", "identifier")]
        return found == [self.source, self.digest(theme)]

    def write(self, folder: Path, theme: str) -> Path:
        """Draw it.

        Raises:
            charts.NoMatplotlibError: it cannot be drawn here.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file(theme)
        metadata = {"Title": self.title, "Source": self.source, "Identifier": self.digest(theme)}
        charts.save(self.chart, charts.THEMES[theme], path, self.stem, metadata)
        return path

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


def of(path: Path, result: Result) -> list[Picture]:
    """The pictures of a result; of one without curves, none."""
    if result["schema"] == FRONTIER:
        return [_frontier(path, result, *shape) for shape in _shapes(result)]
    return [_scaling(path, result)] if result["schema"] == SCALING else []


def stale(
    results: dict[Path, Result], folder: Path, everything: bool = False
) -> Iterator[tuple[Picture, str]]:
    """What is missing there, or shows something else; or all, with the themes."""
    for path, result in results.items():
        for picture in of(path, result):
            for theme in charts.THEMES:
                if everything or not picture.is_current(folder, theme):
                    yield picture, theme


def missing(result: Result) -> list[str]:
    """What the pictures lack because it failed or took too long: a paragraph, or none."""
    if result["schema"] == FRONTIER:
        parts = [(f"{_kind(c)}, {c['rows']} x {c['width']}", c) for c in result["curves"]]
    else:
        parts = [(w["shape"], w) for w in result["workloads"]]
    lines = [f"{label}: {part['reason']}" for label, part in parts if part.get("reason")]
    for label, part in parts:
        for name, entry in part["results"].items():
            if entry["reason"]:
                lines.append(f"{name}, {label}: {entry['reason']}")
    # A reason is the same for students as they are and rotated.
    unique = "\n".join(f"- {line}" for line in dict.fromkeys(lines))
    return [f"Not measured:\n{unique}"] if unique else []


def _kind(curve: dict[str, Any]) -> str:
    return f"{curve['measure'].removeprefix('cka_')}, {curve['dtype']}"


def _shapes(result: Result) -> list[tuple[int, int]]:
    return list(dict.fromkeys((c["rows"], c["width"]) for c in result["curves"]))


def _frontier(path: Path, result: Result, rows: int, width: int) -> Picture:
    """A panel for each dtype and each kind of CKA."""
    curves = [c for c in result["curves"] if (c["rows"], c["width"]) == (rows, width)]
    panels: dict[str, list[Line]] = {}
    for curve in sorted(curves, key=lambda c: c["rotated"]):
        panels.setdefault(_kind(curve), []).extend(_error_lines(curve))
    note = (
        f"Features {rows} x {width}. Solid: student near its teacher, median and range of "
        f"{result['pairs']} pairs. Dotted: the same, rotated."
    )
    if any(None in line.middle for lines in panels.values() for line in lines):
        note += " Crosses: NaN or infinite."
    chart = Chart(
        [
            Panel(
                kind,
                "1 - CKA; to the right, nearer to the teacher",
                "relative error of the gradient",
                lines,
                falling=True,
                useless=1.0,
            )
            for kind, lines in panels.items()
        ],
        columns=2,
        named=True,
        note=note,
    )
    device = result["environment"]["device"]
    title = f"Error of the gradient of linear CKA near similarity 1, {rows} x {width}, {device}"
    return Picture(
        f"frontier-{environment.slug(device)}-{rows}x{width}",
        f"{rows} x {width}",
        path.name,
        title,
        f"{title}. {_frontier_in_words(curves)}",
        chart,
    )


def _error_lines(curve: dict[str, Any]) -> list[Line]:
    x = [d["median"] for d in curve["distances"]]

    def line(name: str, errors: Sequence[dict[str, float | None]], limit: bool = False) -> Line:
        low, middle, high = ([e[key] for e in errors] for key in ("min", "median", "max"))
        return Line(name, x, low, middle, high, curve["rotated"], limit)

    found = [] if curve["rotated"] else [line(ROUNDING, curve["rounding"], limit=True)]
    for name, entry in curve["results"].items():
        if entry["errors"] and entry["reason"] is None:
            found.append(line(name, entry["errors"]))
    return found


def _frontier_in_words(curves: Sequence[dict[str, Any]]) -> str:
    """Who is how wrong at the last point of each panel."""
    sentences = []
    for curve in curves:
        if curve["rotated"]:
            continue
        errors = [
            f"{name} {_in_words(entry['errors'][-1]['median'])}"
            for name, entry in curve["results"].items()
            if entry["errors"] and entry["reason"] is None
        ]
        distance = tables.error_text(curve["distances"][-1]["median"])
        sentences.append(f"{_kind(curve)}, at 1 - CKA = {distance}: {', '.join(errors)}.")
    return " ".join(sentences)


def _in_words(error: float | None) -> str:
    return f"{error:.0f}" if error is not None and error >= 1 else tables.error_text(error)


_AXES = {"rows": "rows N", "width": "width D", "layers": "layers L"}


def _scaling(path: Path, result: Result) -> Picture:
    """A panel for each size that grows."""
    panels, words = [], []
    for curve in result["curves"]:
        workloads = [result["workloads"][i] for i in curve["workloads"]]
        along, lines = curve["along"], _time_lines(curve["along"], workloads)
        panels.append(Panel(_fixed(along, workloads[0]), _AXES[along], "ms", lines))
        words.append(_scaling_in_words(along, lines))
    device = result["environment"]["device"]
    title = f"Time of linear CKA, forward and backward, as features grow, {device}"
    note = "Medians of interleaved calls; bands from the 0.2 to the 0.8 quantile."
    if any(line.wrong for panel in panels for line in panel.lines):
        note += " Crosses: a wrong value or gradient."
    return Picture(
        f"scaling-{environment.slug(device)}",
        device,
        path.name,
        title,
        f"{title}. {' '.join(words)}",
        Chart(panels, columns=len(panels), named=False, note=note),
    )


def _fixed(along: str, workload: dict[str, Any]) -> str:
    """What does not grow."""
    sizes = {"rows": "N", "width": "D"}
    rows, width = (sizes[key] if key == along else workload[key] for key in sizes)
    return f"{'L x ' if along == 'layers' else ''}{rows} x {width} {workload['dtype']}"


def _time_lines(along: str, workloads: Sequence[dict[str, Any]]) -> list[Line]:
    """Milliseconds; what was not measured has no point."""
    names = dict.fromkeys(name for w in workloads for name in w["results"])
    lines = []
    for name in names:
        measured = [
            w for w in workloads if w["results"].get(name, {"reason": ""})["reason"] is None
        ]
        entries = [w["results"][name] for w in measured]
        low, middle, high = (
            [1e3 * e["seconds"]["both"][key] for e in entries] for key in ("q20", "q50", "q80")
        )
        wrong = [i for i, entry in enumerate(entries) if entry["wrong"]]
        if measured:
            x = [w[along] for w in measured]
            lines.append(Line(name, x, low, middle, high, wrong=wrong))
    return lines


def _scaling_in_words(along: str, lines: Sequence[Line]) -> str:
    """Who takes how long at the end of a panel."""
    largest = max((line.x[-1] for line in lines), default=0)
    times = []
    for line in lines:
        if line.x[-1] == largest and line.middle[-1] is not None:
            times.append(f"{line.name} {tables.milliseconds(line.middle[-1] / 1e3)}")
    return f"At {_AXES[along]} = {largest}: {', '.join(times)}."
