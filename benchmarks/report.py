"""``python -m benchmarks.report``: write the documents' tables and pictures from result files.

Each section shows the newest result of its kind for each device, and the demo's. ``--check`` writes
nothing. It exits with 1 where a page or a picture differs from the files that the page names. Newer
files are no error: a run of one's own may lie beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import environment, files, pictures, step_table, tables
from .schema import Benchmark, Frontier, Result, Scaling, Step

MEASURED, README, EXAMPLES = "docs/benchmarks.md", "README.md", "examples/README.md"
FOLDER = "benchmarks/results"


class Section(NamedTuple):
    """A result of this kind, of no ``reduced`` profile, as a text between the page's markers."""

    page: str
    name: str
    kind: type[Result]
    text: Callable[[Any], str]
    reduced: Collection[str] = ("smoke",)


SECTIONS = (
    Section(README, "speed", Benchmark, tables.best_and_worst),
    Section(README, "cost", Step, step_table.cost, reduced=("smoke", "cpu")),
    Section(MEASURED, "benchmarks", Benchmark, tables.summary),
    Section(MEASURED, "step", Step, step_table.summary, reduced=("smoke", "cpu")),
    Section(MEASURED, "frontier", Frontier, pictures.summary),
    Section(MEASURED, "scaling", Scaling, pictures.summary),
)


def updated(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers called ``name``; ValueError if it has none."""
    first, _, last = _section(page, name)
    return f"{first}\n{text}\n{last}"


def _section(page: str, name: str) -> tuple[str, str, str]:
    """The page before a section, the section, and the rest."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page needs the markers {begin} and {end}")
    first, _, rest = page.partition(begin)
    inside, _, last = rest.partition(end)
    return first + begin, inside, end + last


def results(section: Section, root: Path, check: bool) -> dict[Path, Result]:
    """The results that a section shows: to check it, those that it names."""
    folder = root / FOLDER
    if not check:
        return dict(files.newest(folder, section.kind, section.reduced))
    _, text, _ = _section((root / section.page).read_text(encoding="utf-8"), section.name)
    names = re.findall(rf"^From `{FOLDER}/(.+)`\.$", text, re.MULTILINE)
    return {folder / name: files.read(folder / name) for name in names}


def write(texts: Mapping[tuple[str, str], str], root: Path, check: bool) -> bool:
    """Write texts into pages between markers, or only check them; whether something differed."""
    differs = False
    for (page, name), text in texts.items():
        path = root / page
        before = path.read_text(encoding="utf-8")
        after = updated(before, name, text)
        if before != after:
            differs = True
            print(f"{path}: {name} {'differs' if check else 'is written'}")
            if not check:
                path.write_text(after, encoding="utf-8")
    return differs


def main(arguments: Sequence[str] | None = None, root: Path = environment.ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    check = parser.parse_args(arguments).check
    from examples.digits.tables import demo  # needs scikit-learn, which no benchmark needs

    demo_result = root / "examples" / "results" / "results.json"
    texts = {(EXAMPLES, "demo"): demo(json.loads(demo_result.read_text(encoding="utf-8")))}
    drawn: list[pictures.Picture] = []
    for section in SECTIONS:
        shown = results(section, root, check)
        drawn += [picture for result in shown.values() for picture in pictures.of(result)]
        paragraphs = [f"{section.text(r)}\n\nFrom `{FOLDER}/{p.name}`." for p, r in shown.items()]
        texts[section.page, section.name] = "\n\n".join(paragraphs) or "Not measured yet."
    differs = write(texts, root, check)
    for picture in drawn:
        path = (root / MEASURED).parent / picture.link
        if not picture.is_current(path):
            differs = True
            print(f"{path} {'differs' if check else 'is drawn'}")
            if not check:
                picture.write(path)
    return int(check and differs)


if __name__ == "__main__":
    sys.exit(main())
