"""``python -m benchmarks.report``: write the README's tables and pictures from result files.

The demo's, and of each kind of benchmark, for each device, the newest. ``--check`` writes nothing
and exits with 1 where the README or a picture is not what the files that the README names say;
newer ones are no error, so that a run of one's own may lie beside them. Pictures that are of these
results stay as they are, and matplotlib is only needed to draw others.
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


class ReportError(Exception):
    """Why there is no report; the message is for the user."""


def named(readme: str, name: str, folder: Path) -> dict[Path, Result]:
    """The results that a section of the README says it comes from; none if it is still pending."""
    found = _file_names(readme, name)
    if not found and _inside(readme, name) != pending(name):
        raise ReportError(f"the README names no result for {name}: run python -m benchmarks.report")
    for path in (folder / file for file in found):
        if not path.exists():
            raise ReportError(f"the README names {path}, which does not exist")
    return {folder / file: files.read(folder / file) for file in found}


def _file_names(readme: str, name: str) -> list[str]:
    return re.findall(r"^From `(?:.*/)?([^/`]+\.json)`\.$", _inside(readme, name), re.MULTILINE)


def _inside(readme: str, name: str) -> str:
    first, last = _markers(name)
    return readme[readme.find(first) + len(first) : readme.find(last)].strip()


def with_tables(
    summary: Callable[[Result], str], explanation: str
) -> Callable[[dict[Path, Result]], str]:
    """The text of a section of tables: of each result, and what explains them all."""

    def text(results: dict[Path, Result]) -> str:
        parts = []
        for path, result in results.items():
            parts += [summary(result), f"From `{_short(path)}`."]
        return "\n\n".join([*parts, explanation])

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
    """A section of the README: the kind of result that it shows, what writes it, and its text.

    Of the ``reduced`` profiles it shows nothing.
    """

    schema: str
    command: str
    text: Callable[[dict[Path, Result]], str]
    reduced: tuple[str, ...] = ("smoke",)


SECTIONS = {
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


def section(name: str, readme: str, folder: Path, check: bool) -> tuple[dict[Path, Result], str]:
    """The results that a section is about, and what it has to say."""
    kind = SECTIONS[name]
    if check:
        results = named(readme, name, folder)
    else:
        results = files.newest(folder, kind.schema, kind.reduced)
    # A table that is there is not given up for the lack of a file.
    if not results and not check and _file_names(readme, name):
        raise ReportError(f"no result of the kind {kind.schema!r} in {folder}")
    return results, kind.text(results) if results else pending(name)


def updated(readme: str, name: str, text: str) -> str:
    """The README, or another page, with ``text`` between the markers called ``name``."""
    first, last = _markers(name)
    begin, end = readme.find(first), readme.find(last)
    if begin < 0 or end < begin:
        raise ReportError(f"the page needs the markers {first} and {last}, in this order")
    return f"{readme[: begin + len(first)]}\n{text}\n{readme[end:]}"


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
    parser.add_argument("--readme", type=Path, default=environment.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=files.RESULTS)
    parser.add_argument("--demo", type=Path, default=DEMO, help="the demo's results.json")
    options = parser.parse_args(arguments)
    drawn = options.readme.parent / pictures.FOLDER
    try:
        before = options.readme.read_text(encoding="utf-8")
        after = before
        shown: dict[Path, Result] = {}
        for name in SECTIONS:
            results, text = section(name, before, options.results, options.check)
            after = updated(after, name, text)
            shown |= results
        record = json.loads(options.demo.read_text(encoding="utf-8"))
        after = updated(after, "demo", demo.section(record))
        stale = list(pictures.stale(shown, drawn, everything=options.redraw))
        if not options.check:
            for picture, theme in stale:
                print(f"wrote {picture.write(drawn, theme)}")
    except (OSError, ReportError, ValueError, charts.NoMatplotlibError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    if options.check:
        wrong = [options.readme] if before != after else []
        wrong += [drawn / picture.file(theme) for picture, theme in stale]
        for path in wrong:
            print(f"{path} is not what the results say: run python -m benchmarks.report")
        return 1 if wrong else 0
    if before != after:
        options.readme.write_text(after, encoding="utf-8")
        print(f"wrote {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
