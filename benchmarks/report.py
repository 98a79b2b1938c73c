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
from typing import Any

from . import demo, environment, files, pictures, step_table, tables
from .schema import Benchmark, Frontier, Lora, Result, Scaling, Step

DEMO = environment.ROOT / "examples" / "results" / "results.json"
# Pages, from the repository's root: where most sections stand, and where the others do.
MEASURED, README, EXAMPLES = "docs/benchmarks.md", "README.md", "examples/README.md"


class ReportError(Exception):
    """There is no report; the message tells the user why."""


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


@dataclass(frozen=True)
class Section:
    """A section of a page: the kind of result that it shows, what writes it, and a result's text.

    Results of the ``reduced`` profiles are not shown.
    """

    kind: type[Result]
    command: str
    summary: Callable[[Any], str]
    reduced: tuple[str, ...] = ("smoke",)
    page: str = MEASURED


SECTIONS = {
    "speed": Section(Benchmark, "run", tables.best_and_worst, page=README),
    "cost": Section(Step, "step", step_table.cost, page=README),
    "benchmarks": Section(Benchmark, "run", tables.summary),
    "step": Section(Step, "step", step_table.summary),
    "lora": Section(Lora, "lora --profile full", step_table.lora_summary, ("smoke", "cpu")),
    "frontier": Section(Frontier, "frontier", pictures.summary),
    "scaling": Section(Scaling, "scaling", pictures.summary),
}


def pending(name: str) -> str:
    """The text of a section while there is no result."""
    return (
        f"Not measured yet: `python -m benchmarks.{SECTIONS[name].command}` does, and then "
        "`python -m benchmarks.report` writes this section."
    )


def section(name: str, page: str, folder: Path, check: bool) -> tuple[dict[Path, Result], str]:
    """The results that a section of a page is about, and its text."""
    shown = SECTIONS[name]
    if check:
        results = named(page, name, folder)
    else:
        results = files.newest(folder, shown.kind, shown.reduced)
    # A table stays where its files are missing.
    if not results and not check and _file_names(page, name):
        raise ReportError(f"no result of the kind {shown.kind.schema!r} in {folder}")
    parts = [f"{shown.summary(r)}\n\nFrom `{_short(path)}`." for path, r in results.items()]
    return results, "\n\n".join(parts) or pending(name)


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
        sources: dict[Path, Result] = {}
        for name, page in ((name, shown.page) for name, shown in SECTIONS.items()):
            results, text = section(name, before[page], options.results, options.check)
            after[page] = updated(after[page], name, text)
            sources |= results
        record = json.loads(options.demo.read_text(encoding="utf-8"))
        after[EXAMPLES] = updated(after[EXAMPLES], "demo", demo.section(record))
        stale = list(pictures.stale(sources.values(), drawn, everything=options.redraw))
        if not options.check:
            for picture, theme in stale:
                print(f"wrote {picture.write(drawn, theme)}")
    except (OSError, ReportError, ValueError, pictures.NoMatplotlibError) as error:
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
