"""``python -m benchmarks.report``: write the documents' tables and pictures from result files.

Each section shows the newest result of its kind for each device, and the demo's. ``--check`` writes
nothing. It exits with 1 where a page or a picture differs from the files that the page names. Newer
files are no error: a run of one's own may lie beside them. Pictures of these results stay as they
are, and only other pictures need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import charts, demo, environment, files, lora_table, pictures, step_table, tables
from .files import Result
from .schema import BENCHMARK, FRONTIER, LORA, SCALING, STEP

DEMO = environment.ROOT / "examples" / "results" / "results.json"
# Pages, from the repository's root: where most sections stand, and where the others do.
MEASURED, README, EXAMPLES = "docs/benchmarks.md", "README.md", "examples/README.md"


class ReportError(Exception):
    """Why there is no report; the message is for the user."""


def named(page: str, name: str, folder: Path) -> dict[Path, Result]:
    """The results that a section of a page says it comes from; none if it is still pending."""
    sources = _file_names(page, name)
    where = SECTIONS[name].page
    if not sources and _inside(page, name) != pending(name):
        raise ReportError(f"{where} names no result for {name}: run python -m benchmarks.report")
    for path in (folder / file for file in sources):
        if not path.exists():
            raise ReportError(f"{where} names {path}, which does not exist")
    return {folder / file: files.read(folder / file) for file in sources}


def _file_names(page: str, name: str) -> list[str]:
    return re.findall(r"^From `(?:.*/)?([^/`]+\.json)`\.$", _inside(page, name), re.MULTILINE)


def _inside(page: str, name: str) -> str:
    first, last = _markers(name)
    return page[page.find(first) + len(first) : page.find(last)].strip()


def with_tables(
    summary: Callable[[Result], str], explanation: str = ""
) -> Callable[[dict[Path, Result]], str]:
    """The text of a section of tables: of each result, and what explains them all."""

    def text(results: dict[Path, Result]) -> str:
        parts = []
        for path, result in results.items():
            parts += [summary(result), f"From `{_short(path)}`."]
        return "\n\n".join([*parts, explanation]).rstrip()

    return text


def with_pictures(explanation: str) -> Callable[[dict[Path, Result]], str]:
    """The text of a section that shows pictures: of each result the first, and links to others."""

    def text(results: dict[Path, Result]) -> str:
        parts = [explanation]
        for path, result in results.items():
            shown, *others = pictures.of(path, result)
            caption = tables.caption(result)
            if others:
                links = (f"[{other.short}]({other.link('light')})" for other in others)
                caption += f" The same for {', '.join(links)}."
            parts += [shown.markup(), caption, *pictures.missing(result), f"From `{_short(path)}`."]
        return "\n\n".join(parts)

    return text


@dataclass(frozen=True)
class Section:
    """A section of a page: the kind of result that it shows, what writes it, and its text.

    Results of the ``reduced`` profiles are not shown.
    """

    schema: str
    command: str
    text: Callable[[dict[Path, Result]], str]
    reduced: tuple[str, ...] = ("smoke",)
    page: str = MEASURED


SECTIONS = {
    "speed": Section(BENCHMARK, "run", with_tables(tables.best_and_worst), page=README),
    "cost": Section(STEP, "step", with_tables(step_table.cost), page=README),
    "benchmarks": Section(BENCHMARK, "run", with_tables(tables.summary, tables.EXPLANATION)),
    "step": Section(STEP, "step", with_tables(step_table.summary, step_table.EXPLANATION)),
    "lora": Section(
        LORA,
        "lora --profile full",
        with_tables(lora_table.summary, lora_table.EXPLANATION),
        reduced=("smoke", "cpu"),
    ),
    "frontier": Section(
        FRONTIER,
        "frontier",
        with_pictures(
            "How wrong the student's gradient is, beside float64 of the same features, as the "
            "student nears its teacher: where finetuning starts, and where the gradient is a "
            "difference of near-equal terms. An error of 1, where the shade begins, is that of no "
            "gradient at all; rounding alone is that of the right gradient in the features' dtype."
        ),
    ),
    "scaling": Section(
        SCALING,
        "scaling",
        with_pictures(
            "How the time of biased linear CKA, forward and student gradient, grows with rows, "
            "with the width and with layers. rift_kernels gets all layers in one call, the others "
            "one layer a call."
        ),
    ),
}


def pending(name: str) -> str:
    """The text of a section while there is no result."""
    return (
        f"Not measured yet: `python -m benchmarks.{SECTIONS[name].command}` does, and then "
        "`python -m benchmarks.report` writes this section."
    )


def section(name: str, page: str, folder: Path, check: bool) -> tuple[dict[Path, Result], str]:
    """The results that a section of a page is about, and its text."""
    kind = SECTIONS[name]
    if check:
        results = named(page, name, folder)
    else:
        results = files.newest(folder, kind.schema, kind.reduced)
    # A table that is there is not given up for the lack of a file.
    if not results and not check and _file_names(page, name):
        raise ReportError(f"no result of the kind {kind.schema!r} in {folder}")
    return results, kind.text(results) if results else pending(name)


def updated(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers called ``name``."""
    first, last = _markers(name)
    begin, end = page.find(first), page.find(last)
    if begin < 0 or end < begin:
        raise ReportError(f"the page needs the markers {first} and {last}, in this order")
    return f"{page[: begin + len(first)]}\n{text}\n{page[end:]}"


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _short(path: Path) -> str:
    return (
        str(path.relative_to(environment.ROOT))
        if path.is_relative_to(environment.ROOT)
        else path.name
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    parser.add_argument("--redraw", action="store_true", help="draw current pictures, too")
    parser.add_argument("--root", type=Path, default=environment.ROOT, help="folder of the pages")
    parser.add_argument("--results", type=Path, default=files.RESULTS)
    parser.add_argument("--demo", type=Path, default=DEMO, help="the demo's results.json")
    options = parser.parse_args(arguments)
    drawn = (options.root / MEASURED).parent / pictures.FOLDER
    paths = {page: options.root / page for page in (MEASURED, README, EXAMPLES)}
    try:
        before = {page: path.read_text(encoding="utf-8") for page, path in paths.items()}
        after = dict(before)
        shown: dict[Path, Result] = {}
        for name, kind in SECTIONS.items():
            results, text = section(name, before[kind.page], options.results, options.check)
            after[kind.page] = updated(after[kind.page], name, text)
            shown |= results
        record = json.loads(options.demo.read_text(encoding="utf-8"))
        after[EXAMPLES] = updated(after[EXAMPLES], "demo", demo.section(record))
        stale = list(pictures.stale(shown, drawn, everything=options.redraw))
        if not options.check:
            for picture, theme in stale:
                print(f"wrote {picture.write(drawn, theme)}")
    except (OSError, ReportError, ValueError, charts.NoMatplotlibError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    changed = [page for page in paths if before[page] != after[page]]
    if options.check:
        wrong = [paths[page] for page in changed]
        wrong += [drawn / picture.file(theme) for picture, theme in stale]
        for path in wrong:
            print(f"{path} is not what the results say: run python -m benchmarks.report")
        return 1 if wrong else 0
    for page in changed:
        paths[page].write_text(after[page], encoding="utf-8")
        print(f"wrote {paths[page]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
