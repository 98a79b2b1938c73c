"""Result files: written once under a name of their own, and found again."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from . import environment
from .schema import BENCHMARK, validate

RESULTS = environment.ROOT / "benchmarks" / "results"

Result = dict[str, Any]


def write(result: Result, folder: Path) -> Path:
    """Write a result, and return its path: device, kind and time; nothing is overwritten."""
    validate(result)
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    device = environment.slug(result["environment"]["device"])
    kind = "" if result["schema"] == BENCHMARK else f"{result['schema'].split()[1]}-"
    stem = f"{device}-{kind}{now:%Y%m%d-%H%M%S}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    with path.open("x", encoding="utf-8") as file:
        json.dump(result, file, indent=1, allow_nan=False)
        file.write("\n")
    return path


def read(path: Path) -> Result:
    """A result.

    Raises:
        ValueError: it is none; the message says where.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    validate(result)
    return dict(result)


def newest(
    folder: Path, schema: str = BENCHMARK, reduced: Collection[str] = ("smoke",)
) -> dict[Path, Result]:
    """The newest full result of each device, of one kind: not of the profiles named."""
    latest: dict[str, tuple[Path, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        # Other kinds of files lie there, too.
        if result.get("schema") != schema or result["profile"] in reduced:
            continue
        validate(result)
        device, date = (result["environment"][key] for key in ("device", "date"))
        if device not in latest or latest[device][1]["environment"]["date"] < date:
            latest[device] = path, result
    return dict(latest[device] for device in sorted(latest))
