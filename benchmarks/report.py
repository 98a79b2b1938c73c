"""``python -m benchmarks.report``: write the README's tables from result files.

The demo's, and of each kind of benchmark, for each device, the newest. ``--check`` writes nothing
and exits with 1 where the README is not what the files that it names say; newer ones are no error,
so that a run of one's own may lie beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import demo, environment, files, tables
from .files import Result
from .schema import BENCHMARK

DEMO = environment.ROOT / "examples" / "results" / "results.json"


class ReportError(Exception):
    """Why there is no report; the message is for the user."""


def named(readme: str, name: str, folder: Path) -> dict[Path, Result]:
    """The results that a section of the README says it comes from."""
    first, last = _markers(name)
    text = readme[readme.find(first) : readme.find(last)]
    found = re.findall(r"^From `(?:.*/)?([^/`]+\.json)`\.$", text, re.MULTILINE)
    if not found:
        raise ReportError(f"the README names no result for {name}: run python -m benchmarks.report")
    for path in (folder / file for file in found):
        if not path.exists():
            raise ReportError(f"the README names {path}, which does not exist")
    return {folder / file: files.read(folder / file) for file in found}


def benchmarks(results: dict[Path, Result]) -> str:
    parts = []
    for path, result in results.items():
        parts += [tables.summary(result), f"From `{_short(path)}`."]
    return "\n\n".join([*parts, tables.EXPLANATION])


# Section of the README -> the kind of result that it shows, and its text.
SECTIONS: dict[str, tuple[str, Callable[[dict[Path, Result]], str]]] = {
    "benchmarks": (BENCHMARK, benchmarks),
}


def updated(readme: str, name: str, text: str) -> str:
    """The README with ``text`` between the markers called ``name``."""
    first, last = _markers(name)
    begin, end = readme.find(first), readme.find(last)
    if begin < 0 or end < begin:
        raise ReportError(f"the README needs the markers {first} and {last}, in this order")
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
    parser.add_argument("--readme", type=Path, default=environment.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=files.RESULTS)
    parser.add_argument("--demo", type=Path, default=DEMO, help="the demo's results.json")
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text(encoding="utf-8")
        after = before
        for name, (schema, text) in SECTIONS.items():
            if options.check:
                results = named(before, name, options.results)
            else:
                results = files.newest(options.results, schema)
            if not results:
                raise ReportError(f"no result of the kind {schema!r} in {options.results}")
            after = updated(after, name, text(results))
        record = json.loads(options.demo.read_text(encoding="utf-8"))
        after = updated(after, "demo", demo.section(record))
    except (OSError, ReportError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    if before == after:
        return 0
    if options.check:
        print(f"{options.readme} is not what the results say: run python -m benchmarks.report")
        return 1
    options.readme.write_text(after, encoding="utf-8")
    print(f"wrote {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
