"""Result files: written once under a name of their own, and found again."""

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
    """Write a result, and return its path: device, kind and time; nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    kind = "" if result.schema == Benchmark.schema else f"{result.schema.split()[1]}-"
    stem = f"{environment.slug(result.environment.device)}-{kind}{now:%Y%m%d-%H%M%S}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
    with path.open("x", encoding="utf-8") as file:
        file.write(f"{text}\n")
    return path


def read(path: Path) -> Result:
    """A result; ValueError where the file has none."""
    return parse(json.loads(path.read_text(encoding="utf-8")))


def newest(
    folder: Path, kind: type[Kind], reduced: Collection[str] = ("smoke",)
) -> dict[Path, Kind]:
    """The newest result of a kind for each device; ``reduced`` profiles do not count."""
    contents = {path: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    # Other kinds of files lie there, too.
    results: dict[Path, Any] = {
        path: parse(c) for path, c in contents.items() if c.get("schema") == kind.schema
    }
    latest: dict[str, Path] = {}
    for path, result in sorted(results.items(), key=lambda item: item[1].environment.date):
        if result.profile not in reduced:
            latest[result.environment.device] = path
    return {latest[device]: results[latest[device]] for device in sorted(latest)}
