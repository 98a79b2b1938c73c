"""``python -m benchmarks.report``: write the README's tables from result files.

The demo's, and of the benchmarks, for each device, the newest. ``--check`` writes nothing and exits
with 1 where the README is not what the files that it names say; newer ones are no error, so that a
run of one's own may lie beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import demo, environment, tables
from .run import RESULTS
from .schema import SCHEMA, validate

DEMO = environment.ROOT / "examples" / "results" / "results.json"


class ReportError(Exception):
    """Why there is no report; the message is for the user."""


def newest(folder: Path) -> dict[Path, tables.Result]:
    """The newest full result of each device."""
    latest: dict[str, tuple[Path, tables.Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        # Other kinds of files lie there, too.
        if result.get("schema") != SCHEMA or result["profile"] == "smoke":
            continue
        validate(result)
        device, date = (result["environment"][key] for key in ("device", "date"))
        if device not in latest or latest[device][1]["environment"]["date"] < date:
            latest[device] = path, result
    if not latest:
        raise ReportError(f"no benchmark result in {folder}: run python -m benchmarks.run")
    return dict(latest[device] for device in sorted(latest))


def named(readme: str, folder: Path) -> dict[Path, tables.Result]:
    """The results that the README's tables say they come from."""
    names = re.findall(r"^From `(?:.*/)?([^/`]+\.json)`\.$", readme, re.MULTILINE)
    if not names:
        raise ReportError("the README names no benchmark result: run python -m benchmarks.report")
    results = {}
    for path in (folder / name for name in names):
        if not path.exists():
            raise ReportError(f"the README names {path}, which does not exist")
        results[path] = json.loads(path.read_text(encoding="utf-8"))
        validate(results[path])
    return results


def section(results: dict[Path, tables.Result]) -> str:
    """What stands between the markers."""
    parts = []
    for path, result in results.items():
        parts += [tables.summary(result), f"From `{_short(path)}`."]
    return "\n\n".join([*parts, tables.EXPLANATION])


def updated(readme: str, name: str, text: str) -> str:
    """The README with ``text`` between the markers called ``name``."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    begin, end = readme.find(first), readme.find(last)
    if begin < 0 or end < begin:
        raise ReportError(f"the README needs the markers {first} and {last}, in this order")
    return f"{readme[: begin + len(first)]}\n{text}\n{readme[end:]}"


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
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--demo", type=Path, default=DEMO, help="the demo's results.json")
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text(encoding="utf-8")
        results = named(before, options.results) if options.check else newest(options.results)
        after = updated(before, "benchmarks", section(results))
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
