"""``python -m tests.support.tried_with``: write the tables of docs/models.md from the list.

``--check`` writes nothing, and exits with 1 where the page differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, report
from tests.features.architectures import ARCHITECTURES
from tests.features.architectures.architecture import Architecture

PAGE, NAME = "docs/models.md", "models"


def code(text: str) -> str:
    return f"`{text}`" if text else "the model itself"


def cells(architecture: Architecture) -> tuple[str, str, str]:
    """How the regulariser is used: layers, poolings, and what else there is to know."""
    layers = architecture.layers
    names = [layers] if isinstance(layers, str) else layers
    poolings = [
        code(each) if isinstance(each, str) else f"a function: {each.__name__.replace('_', ' ')}"
        for each in architecture.poolings
    ]
    notes = [setting(name, value) for name, value in architecture.settings.items()]
    if architecture.reads_padding:
        notes.append(f"padding changes its features: {architecture.reads_padding}")
    return ", ".join(map(code, names)), ", ".join(poolings), "; ".join(notes)


def setting(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        parts = [f"{described(each)} for {code(layers)}" for layers, each in value.items()]
        return f"`{name}=` {', '.join(parts)}"
    return f"`{name}=` {described(value)}" if callable(value) else code(f"{name}={value!r}")


def described(value: object) -> str:
    return "a function" if callable(value) else code(repr(value))


def table(kind: str, architectures: Mapping[str, Architecture]) -> str:
    """Models that are used in the same way share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, architecture in architectures.items():
        rows.setdefault(cells(architecture), []).append(name)
    lines = [f"| {' | '.join([', '.join(names), *row])} |" for row, names in rows.items()]
    head = "| models | `layers=` | `pooling=` | notes |\n|---|---|---|---|"
    return "\n".join([f"### {kind}\n", head, *lines])


def text() -> str:
    """All tables, and how many models they have."""
    count = sum(map(len, ARCHITECTURES.values()))
    tables = [table(kind, architectures) for kind, architectures in ARCHITECTURES.items()]
    return "\n\n".join([f"These are {count} models.", *tables])


def main(arguments: Sequence[str] | None = None, root: Path = environment.ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.tried_with", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    check = parser.parse_args(arguments).check
    return int(report.write({(PAGE, NAME): text()}, root, check) and check)


if __name__ == "__main__":
    sys.exit(main())
