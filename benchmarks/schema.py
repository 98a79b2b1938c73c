"""The forms of result files, and a check that a result has its own.

Every result has a ``schema``, a ``profile``, and an ``environment`` as environment.py describes it.

A benchmark has the machine's peaks, the providers, each with the reason why it cannot run, and the
workloads. A workload's ``results`` has an entry for each provider that does its measure and can run
here: with a ``reason`` where it was not measured, else with seconds per clock and quantile, its
time relative to naive eager's in the same rounds, seconds in a CUDA graph or why there are none,
kernels launched, bytes per phase, and its errors against float64. An error of None is NaN or
infinite.

A scaling is a benchmark and the curves on which its workloads lie, by their places in the list:
those of a curve differ in one size, which ``along`` names.

A frontier has curves of errors: of each provider, or the reason why there are none, and of nothing
but rounding the right gradient, at the same ``distances``, which are 1 - CKA. Each number stands
for ``pairs`` random pairs of features.

A step has the model, and the ways of finetuning it: each with a ``reason`` where it was not
measured, else with seconds and bytes as above, and the error of its loss's gradient. ``left_out``
says which losses were never tried, and why.

A check is no measurement: which kernels agree with known answers, None where that could not be
tried, and every case of them. ``python -m rift_kernels check`` writes it, case by case.

A lora has ways of finetuning with adapters: what they add to the plain step's time, bytes of
weights, and bytes at the peak of a step. The loss by itself is in ``losses``.
"""

from __future__ import annotations

from typing import Any

from .measure import CLOCKS, PHASES, QUANTILES

BENCHMARK = "rift_kernels benchmark 2"
SCALING = "rift_kernels scaling 1"
FRONTIER = "rift_kernels frontier 1"
STEP = "rift_kernels step 1"
LORA = "rift_kernels lora 1"
CHECK = "rift_kernels check 1"

_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))
_OPTIONAL_TEXT = (str, type(None))

# Of every result.
_HEADER: dict[str, Any] = {
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
        "clocks": str,
        "system": str,
        "commit": str,
        "dirty": (bool, type(None)),
        "versions": dict,
    },
}
_PROVIDERS = [{"name": str, "reason": _OPTIONAL_TEXT}]
_BENCHMARK = {
    **_HEADER,
    "peaks": {"matmul_flops": dict, "copy_bytes": _NUMBER},
    "providers": _PROVIDERS,
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
_SCALING = {**_BENCHMARK, "curves": [{"along": str, "workloads": [int]}]}
_SPREAD = dict.fromkeys(("min", "median", "max"), _OPTIONAL_NUMBER)
_FRONTIER = {
    **_HEADER,
    "providers": _PROVIDERS,
    "pairs": int,
    "curves": [
        {
            "measure": str,
            "rows": int,
            "width": int,
            "dtype": str,
            "rotated": bool,
            "distances": [_SPREAD],
            "rounding": [_SPREAD],
            "results": dict,
        }
    ],
}
_BOUNDS = dict.fromkeys(("low", "q50", "high"), _NUMBER)
_MEASURED = {
    "reason": type(None),
    "seconds": {clock: dict.fromkeys(QUANTILES, _NUMBER) for clock in CLOCKS},
    "relative": (_BOUNDS, None),
    "graph": (dict.fromkeys(QUANTILES, _NUMBER), None),
    "graph_reason": str,
    "launches": (int, type(None)),
    "memory": dict.fromkeys(PHASES, int),
    "value_error": _OPTIONAL_NUMBER,
    "gradient_error": _OPTIONAL_NUMBER,
    "wrong": bool,
}
_NOT_MEASURED = {"reason": str}
_ERRORS = {"reason": type(None), "errors": [_SPREAD]}
_NO_ERRORS = {"reason": str, "errors": list}
_SIZE = dict.fromkeys(("image", "patch", "width", "depth", "heads", "classes"), int)
_STEP = {
    **_HEADER,
    "peaks": {"matmul_flops": dict},
    "model": {**_SIZE, "parameters": int, "batch": int, "tokens": int, "autocast": bool},
    "rounds": int,
    "noise": dict,
    "ways": [
        {
            "loss": _OPTIONAL_TEXT,
            "features": _OPTIONAL_TEXT,
            "teacher_runs": bool,
            "predicted_seconds": _NUMBER,
            "reason": _OPTIONAL_TEXT,
            "seconds": (_MEASURED["seconds"], None),
            "memory": (_MEASURED["memory"], None),
            "gradient_error": _OPTIONAL_NUMBER,
            "wrong": bool,
        }
    ],
    "left_out": [{"loss": str, "features": _OPTIONAL_TEXT, "reason": str}],
}

_LORA = {
    **_HEADER,
    "model": {
        **_SIZE,
        "rank": int,
        "parameters": int,
        "trained": int,
        "batch": int,
        "tokens": int,
        "autocast": bool,
    },
    "rounds": int,
    "clock": str,
    "noise": dict,
    "ways": [
        {
            "teacher": _OPTIONAL_TEXT,
            "pooling": _OPTIONAL_TEXT,
            "seconds": (_MEASURED["seconds"], None),
            "cpu_seconds": (dict.fromkeys(QUANTILES, _NUMBER), None),
            "adds": (_BOUNDS, None),
            "loss_adds": (_BOUNDS, None),
            "weights": int,
            "memory": _MEASURED["memory"],
        }
    ],
    "teacher_memory": int,
    "losses": [
        {
            "pooling": str,
            "features": str,
            "predicted_share": _NUMBER,
            "seconds": _MEASURED["seconds"],
            "cpu_seconds": dict.fromkeys(QUANTILES, _NUMBER),
            "share": _BOUNDS,
            "memory": _MEASURED["memory"],
            "kept": int,
        }
    ],
}

_KERNELS = dict.fromkeys(("backend", "family", "dtype"), str)
_STATE = {"good": (bool, type(None)), "seen": str}
_CHECK = {
    **_HEADER,
    "seconds": _NUMBER,
    "complete": bool,
    "backends": _PROVIDERS,
    "kernels": [{**_KERNELS, **_STATE}],
    "cases": [
        {
            **_KERNELS,
            **_STATE,
            "case": str,
            "value_error": _OPTIONAL_NUMBER,
            "gradient_error": _OPTIONAL_NUMBER,
            "seconds": _OPTIONAL_NUMBER,
        }
    ],
}

_FORMS: dict[str, Any] = {
    BENCHMARK: _BENCHMARK,
    SCALING: _SCALING,
    FRONTIER: _FRONTIER,
    STEP: _STEP,
    LORA: _LORA,
    CHECK: _CHECK,
}


def validate(result: Any) -> None:
    """Return if ``result`` is a result of a kind that is known.

    Raises:
        ValueError: it is not; the message says where.
    """
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema not in _FORMS:
        raise ValueError(f"result.schema must be one of {', '.join(_FORMS)}; got {schema!r}")
    _check(result, _FORMS[schema], "result")
    if schema == FRONTIER:
        _validate_results(result, "curves", _ERRORS, _NO_ERRORS)
        _validate_lengths(result)
    elif schema not in (STEP, LORA, CHECK):
        _validate_results(result, "workloads", _MEASURED, _NOT_MEASURED)
    if schema == SCALING:
        _validate_places(result)


def _validate_results(result: Any, what: str, measured: Any, not_measured: Any) -> None:
    names = {provider["name"] for provider in result["providers"]}
    for i, one in enumerate(result[what]):
        where = f"result.{what}[{i}].results"
        for name, entry in one["results"].items():
            if name not in names:
                raise ValueError(f"{where} names {name!r}, which is not in result.providers")
            known = isinstance(entry, dict) and entry.get("reason") is None
            _check(entry, measured if known else not_measured, f"{where}[{name!r}]")


def _validate_lengths(result: Any) -> None:
    for i, curve in enumerate(result["curves"]):
        lists = {"rounding": curve["rounding"]}
        for name, entry in curve["results"].items():
            if entry["reason"] is None:
                lists[f"results[{name!r}].errors"] = entry["errors"]
        expected = len(curve["distances"])
        for name, found in lists.items():
            where = f"result.curves[{i}].{name}"
            _expect(len(found) == expected, where, f"as long as distances, {expected}", len(found))


def _validate_places(result: Any) -> None:
    count = len(result["workloads"])
    for i, curve in enumerate(result["curves"]):
        where = f"result.curves[{i}].along"
        _expect(curve["along"] in ("rows", "width", "layers"), where, "a size", curve["along"])
        for place in curve["workloads"]:
            where = f"result.curves[{i}].workloads"
            _expect(0 <= place < count, where, f"places among {count} workloads", place)


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
