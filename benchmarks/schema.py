"""The forms of result files, and a check that a result has its own.

Every result has a ``schema``, a ``profile``, and an ``environment`` as environment.py describes it.

A benchmark has the machine's peaks, the providers, each with the reason why it cannot run, and the
workloads. A workload's ``results`` has an entry for each provider that does its measure and can run
here: with a ``reason`` where it was not measured, else with seconds per clock and quantile, seconds
in a CUDA graph or why there are none, kernels launched, bytes per phase, and its errors against
float64. An error of None is NaN or infinite.
"""

from __future__ import annotations

from typing import Any

from .measure import CLOCKS, PHASES, QUANTILES

BENCHMARK = "rift_kernels benchmark 2"

_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))
_OPTIONAL_TEXT = (str, type(None))

# Of every result.
_HEADER = {
    "schema": str,
    "profile": str,
    "environment": {
        "date": str,
        "device": str,
        "cpu": str,
        "cores": int,
        "threads": int,
        "gpu": _OPTIONAL_TEXT,
        "driver": _OPTIONAL_TEXT,
        "system": str,
        "commit": str,
        "dirty": (bool, type(None)),
        "versions": dict,
    },
}
_BENCHMARK = {
    **_HEADER,
    "peaks": {"matmul_flops": dict, "copy_bytes": _NUMBER},
    "providers": [{"name": str, "reason": _OPTIONAL_TEXT}],
    "workloads": [
        {
            "measure": str,
            "shape": str,
            "rows": int,
            "width": int,
            "layers": int,
            "dtype": str,
            "valid": _NUMBER,
            "kind": str,
            "floor_seconds": _OPTIONAL_NUMBER,
            "predicted_seconds": dict,
            "reason": _OPTIONAL_TEXT,
            "rounds": int,
            "noise": dict,
            "results": dict,
        }
    ],
}
_MEASURED = {
    "reason": type(None),
    "seconds": {clock: dict.fromkeys(QUANTILES, _NUMBER) for clock in CLOCKS},
    "graph": ({"q20": _NUMBER, "q50": _NUMBER, "q80": _NUMBER}, None),
    "graph_reason": str,
    "launches": (int, type(None)),
    "memory": dict.fromkeys(PHASES, int),
    "value_error": _OPTIONAL_NUMBER,
    "gradient_error": _OPTIONAL_NUMBER,
    "wrong": bool,
}
_NOT_MEASURED = {"reason": str}


_FORMS: dict[str, Any] = {BENCHMARK: _BENCHMARK}


def validate(result: Any) -> None:
    """Return if ``result`` is a result of a kind that is known.

    Raises:
        ValueError: it is not; the message says where.
    """
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema not in _FORMS:
        raise ValueError(f"result.schema must be one of {', '.join(_FORMS)}; got {schema!r}")
    _check(result, _FORMS[schema], "result")
    if schema == BENCHMARK:
        _validate_workloads(result)


def _validate_workloads(result: Any) -> None:
    names = {provider["name"] for provider in result["providers"]}
    for i, workload in enumerate(result["workloads"]):
        where = f"result.workloads[{i}].results"
        for name, entry in workload["results"].items():
            if name not in names:
                raise ValueError(f"{where} names {name!r}, which is not in result.providers")
            measured = isinstance(entry, dict) and entry.get("reason") is None
            _check(entry, _MEASURED if measured else _NOT_MEASURED, f"{where}[{name!r}]")


def _check(value: Any, form: Any, where: str) -> None:
    if isinstance(form, tuple) and form[-1] is None:
        # A form, or None.
        if value is not None:
            _check(value, form[0], where)
    elif isinstance(form, dict):
        _expect(isinstance(value, dict), where, "an object", value)
        missing, unknown = sorted(form.keys() - value.keys()), sorted(value.keys() - form.keys())
        if missing or unknown:
            raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}")
        for key, inner in form.items():
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(form, list):
        _expect(isinstance(value, list), where, "a list", value)
        for i, item in enumerate(value):
            _check(item, form[0], f"{where}[{i}]")
    else:
        _expect(isinstance(value, form), where, str(form), value)


def _expect(condition: bool, where: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{where} must be {expected}; got {value!r}")
