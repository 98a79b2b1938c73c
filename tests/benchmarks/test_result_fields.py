"""benchmarks/README.md describes every field of a result file, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import environment, schema

DOCUMENT = environment.ROOT / "benchmarks" / "README.md"
# Of each kind, the sections whose tables together describe it.
SECTIONS = {
    schema.BENCHMARK: ("Every result", "Benchmark"),
    schema.SCALING: ("Every result", "Benchmark", "Scaling"),
    schema.FRONTIER: ("Every result", "Frontier"),
    schema.STEP: ("Every result", "Step"),
    schema.LORA: ("Every result", "LoRA"),
    schema.CHECK: ("Every result", "Check"),
}
RESULTS = {
    schema.BENCHMARK: schema._MEASURED,
    schema.SCALING: schema._MEASURED,
    schema.FRONTIER: schema._ERRORS,
}
NAMES = {
    tuple(schema.CLOCKS): "<clock>",
    tuple(schema.PHASES): "<phase>",
    tuple(schema.QUANTILES): "<quantile>",
    ("low", "q50", "high"): "<bound>",
    tuple(schema._SPREAD): "<of pairs>",
}
TYPES = {str: "text", int: "integer", float: "number", bool: "boolean", dict: "object"}


def fields(form: Any, results: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """What a form consists of: path and type."""
    if isinstance(form, tuple) and form[-1] is None:
        # A form, or null: all of it, or none.
        for inner, kind in fields(form[0], results, path):
            yield inner, f"{kind} or null"
    elif isinstance(form, list):
        yield from fields(form[0], results, f"{path}[]")
    elif isinstance(form, dict):
        shared = NAMES.get(tuple(form))
        items = [(shared, next(iter(form.values())))] if shared else form.items()
        for key, inner in items:
            yield from fields(inner, results, f"{path}.{key}" if path else key)
    elif path.endswith(".results"):
        for inner, kind in fields(results, None, f"{path}.<provider>"):
            yield inner, "text or null" if inner.endswith(".reason") else kind
    else:
        yield path, _type(form)


def _type(form: Any) -> str:
    kinds = form if isinstance(form, tuple) else (form,)
    # JSON's numbers are of one type.
    names = [TYPES[kind] for kind in kinds if kind is not type(None)]
    name = "number" if names == ["integer", "number"] else " or ".join(names)
    return f"{name} or null" if type(None) in kinds else name


def described(section: str) -> dict[str, str]:
    """Path and type, of a section's table."""
    text = DOCUMENT.read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n## {section}\n")
    assert found, f"{DOCUMENT} needs a section {section}"
    rows = re.findall(r"^\| `(.+?)` +\| (.+?) +\| .*\S.* \|$", rest.split("\n## ")[0], re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a field is described twice"
    return dict(rows)


@pytest.mark.parametrize("kind", schema._FORMS)
def test_every_field_is_described(kind: str) -> None:
    found: dict[str, str] = {}
    for section in SECTIONS[kind]:
        found |= described(section)
    assert found == dict(fields(schema._FORMS[kind], RESULTS.get(kind)))
