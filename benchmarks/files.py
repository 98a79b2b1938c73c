"""Result files: each is written once, and the newest of a kind are found again."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from . import environment
from .schema import Benchmark, Result, parse

Kind = TypeVar("Kind", bound=Result)
RESULTS = environment.ROOT / "benchmarks" / "results"


def write(result: Result, folder: Path) -> Path:
    """Write a result to a file that is named after device, kind and time."""
    now = datetime.datetime.now(datetime.UTC)
    kind = "" if result.schema == Benchmark.schema else f"{result.schema.split()[1]}-"
    device = environment.slug(result.environment.device)
    path = folder / f"{device}-{kind}{now:%Y%m%d-%H%M%S-%f}.json"
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")
    return path


def read(path: Path) -> Any:
    return parse(json.loads(path.read_text(encoding="utf-8")))


def newest(
    folder: Path, kind: type[Kind], reduced: Collection[str] = ("smoke",)
) -> dict[Path, Kind]:
    """The newest result of a kind for each device; ``reduced`` profiles do not count."""
    contents = {path: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    results = {
        path: parse(content)
        for path, content in contents.items()
        if content.get("schema") == kind.schema and content["profile"] not in reduced
    }
    dates = sorted(results, key=lambda path: results[path].environment.date)
    latest = {results[path].environment.device: path for path in dates}
    return {path: results[path] for _, path in sorted(latest.items())}
