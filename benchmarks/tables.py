"""Results as Markdown tables, for the terminal and for the documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from .measure import CLOCKS, PHASES
from .oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE
from .providers import HALF, HAND_DERIVED, NAIVE, OURS, PACKAGES, TF32, WIDE
from .workloads import AUTOTUNED, CKA_MEASURES, COMPILED

Result = dict[str, Any]

# Titles of the measures in the first column.
_TITLES = {
    "cka_biased": "biased",
    "cka_debiased": "debiased",
    "procrustes": "Procrustes",
    "covariance": "covariance",
    "bures": "Bures",
}
FIXED_COSTS = (
    "A graph has forward and backward of inputs that together exceed the L2 cache twice. The "
    "host's time is until the calls return, without waiting for the device."
)
EXPLANATION = (
    "Forward and backward together, medians of interleaved calls; on a GPU, between events. "
    "Ratios are naive eager's time, in the features' dtype, divided by the column's, so more is "
    "faster; `naive in` is the same code on features cast to another dtype; `~` marks a "
    "difference within the noise, which is that of naive eager timed twice. The predicted ratio "
    "is that of a count of floating point operations at the measured peak of a matrix product. "
    "Memory is ours over naive eager's, at the peak and without the inputs. The roofline is the "
    "least time that the optimal count of operations or one pass over the features allows on this "
    "machine, as a share of ours; its peak is that of torch.mm, which other libraries can exceed. "
    "A gradient error is relative, against float64. **Wrong** is a "
    f"value off by more than {VALUE_TOLERANCE} or a gradient by more than {GRADIENT_TOLERANCE:.0%},"
    " at whatever speed."
)


def summary(result: Result) -> str:
    """A result's caption, its tables and what they lack."""
    measured = [w for w in result["workloads"] if w["reason"] is None]
    cka = [w for w in measured if w["measure"] in CKA_MEASURES]
    others = [w for w in measured if w["measure"] not in CKA_MEASURES]
    parts = [caption(result)]
    for title, workloads in (("Linear CKA", cka), ("Other measures", others)):
        if workloads:
            parts += [f"{title}:", _comparison(workloads)]
    in_graphs = [w for w in measured if any(e.get("graph") for e in w["results"].values())]
    if in_graphs:
        parts += ["The device alone, in CUDA graphs, and what a call costs the host:"]
        parts += [_fixed_costs(in_graphs), FIXED_COSTS]
    missing = _not_measured(result)
    if missing:
        parts.append("Not measured:\n" + "\n".join(f"- {line}" for line in missing))
    return "\n\n".join(parts)


def best_and_worst(result: Result) -> str:
    """A sentence for the README: the largest and the smallest ratio to right naive code."""
    ratios = {
        _full_label(w): ratio
        for w in result["workloads"]
        if (naive := _measured(w, NAIVE)) and not naive["wrong"] and (ratio := _ratio(w, _best(w)))
    }
    where = f"On {result['environment']['device']}"
    if not ratios:
        return f"{where}, no workload was measured."
    best, worst = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    return (
        f"{where}, the best of {len(ratios)} workloads is {best}: "
        f"**{_ratio_text(ratios[best])}** as fast as naive code. The worst is {worst}: "
        f"**{_ratio_text(ratios[worst])}**."
    )


def predictions(workloads: Sequence[Result]) -> str:
    """What the model says before anything is measured: ratios to naive eager."""
    names = _names(w["predicted_seconds"] for w in workloads)
    rows = []
    for w in workloads:
        rows.append([_label(w), *(_ratio_text(_predicted(w, name)) for name in names)])
    return markdown(["predicted ratio", *names], rows)


def details(result: Result) -> str:
    """All that was measured, workload by workload."""
    # Without a GPU the wall is the only clock there is.
    clocks = CLOCKS if result["environment"]["gpu"] else PHASES
    return "\n\n".join(_details(workload, clocks) for workload in result["workloads"])


def caption(result: Result) -> str:
    """Hardware, versions, commit and date."""
    e = result["environment"]
    cpu = f"{e['cpu']}, {_count(e['cores'], 'core')}, {_count(e['threads'], 'thread')}"
    hardware = f"{e['gpu']} (driver {e['driver']}), {cpu}" if e["gpu"] else cpu
    installed = ((name, v) for name, v in e["versions"].items() if v is not None)
    versions = ", ".join(f"{name} {version}" for name, version in installed)
    commit = e["commit"][:12] + (" with local changes" if e["dirty"] else "")
    return f"**{hardware}**, {e['system']}; {versions}; commit {commit}; {e['date'][:10]}."


def _details(workload: Result, clocks: Sequence[str]) -> str:
    title = f"{_label(workload)}: {workload['rounds']} rounds"
    if workload["reason"]:
        return f"{title}: not measured: {workload['reason']}"
    if workload["noise"]:
        title += f", noise {workload['noise']['both']:.1%}"
    header = ["", *clocks, "peak memory", "value error", "gradient error", "note"]
    rows = []
    for name, entry in workload["results"].items():
        if entry["reason"]:
            rows.append([name, *[""] * (len(header) - 2), entry["reason"]])
            continue
        seconds = [milliseconds(entry["seconds"][clock]["q50"]) for clock in clocks]
        errors = [error_text(entry[key]) for key in ("value_error", "gradient_error")]
        note = "wrong" if entry["wrong"] else ""
        rows.append([name, *seconds, f"{entry['memory']['both'] / 2**10:,.0f} KiB", *errors, note])
    return f"{title}\n{markdown(header, rows)}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text, too."""
    table = [header, *rows]
    first, *others = (max(3, *(len(row[i]) for row in table)) for i in range(len(header)))

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(first), *map(str.rjust, row[1:], others)]
        return "| " + " | ".join(cells) + " |"

    rule = "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])
    return "\n".join([line(header), rule, *map(line, rows)])


def milliseconds(seconds: float) -> str:
    return f"{_three_digits(seconds * 1e3)} ms"


def _comparison(workloads: Sequence[Result]) -> str:
    """A row a workload; a column only for what one of the workloads has."""
    names = _names(w["results"] for w in workloads)
    columns: dict[str, Callable[[Result], str]] = {"features": _label, NAIVE: _naive_cell}
    if any(name in names for name in (WIDE, HALF)):
        columns["naive in"] = _cast_cell
    for name in (TF32, COMPILED, AUTOTUNED, HAND_DERIVED):
        if any(_measured(w, name) for w in workloads):
            columns[name.removeprefix(f"{NAIVE} ")] = partial(_speed_cell, name=name)
    if set(PACKAGES) & set(names):
        columns["package"] = _package_cell
    for name in names:
        if name.startswith(OURS):
            columns[name] = partial(_ours_cell, name=name)
    if any(_predicted(w, _best(w)) for w in workloads):
        columns["predicted"] = lambda w: _ratio_text(_predicted(w, _best(w)))
    columns["memory"] = _memory_cell
    if any(w["floor_seconds"] for w in workloads):
        columns["roofline"] = _roofline_cell
    columns["gradient error, naive / ours"] = _error_cell
    return markdown(list(columns), [[cell(w) for cell in columns.values()] for w in workloads])


def _fixed_costs(workloads: Sequence[Result]) -> str:
    """Naive eager and our best side by side: seconds in a graph, seconds of the host, launches."""
    rows = []
    for w in workloads:
        entries = [_measured(w, NAIVE), _measured(w, _best(w))]
        cells = [
            [milliseconds(e["graph"]["q50"]) if e and e["graph"] else "-" for e in entries],
            [milliseconds(e["seconds"]["host"]["q50"]) if e else "-" for e in entries],
            [str(e["launches"]) if e else "-" for e in entries],
        ]
        share = "-"
        if w["floor_seconds"] and entries[1] and entries[1]["graph"]:
            share = f"{w['floor_seconds'] / entries[1]['graph']['q50']:.0%}"
        rows.append([_label(w), *(f"{naive} / {ours}" for naive, ours in cells), share])
    header = ["naive eager / ours", "graph", "host", "launches", "roofline in the graph"]
    return markdown(header, rows)


def _names(entries: Iterable[Result]) -> list[str]:
    """Keys of all entries, each once, in order."""
    return list(dict.fromkeys(name for entry in entries for name in entry))


def _label(w: Result) -> str:
    return f"{_TITLES[w['measure']]}, {w['shape']}"


def _full_label(w: Result) -> str:
    """The label outside of the tables, whose captions say what is linear CKA."""
    cka = " CKA" if w["measure"] in CKA_MEASURES else ""
    return f"{_TITLES[w['measure']]}{cka}, {w['shape']}"


def _measured(w: Result, name: str | None) -> Result | None:
    entry = w["results"].get(name)
    return entry if entry and entry["reason"] is None else None


def _seconds(entry: Result) -> float:
    return entry["seconds"]["both"]["q50"]


def _best(w: Result) -> str | None:
    """Our fastest backend, of those that are right."""
    right = {}
    for name in w["results"]:
        entry = _measured(w, name)
        if name.startswith(OURS) and entry and not entry["wrong"]:
            right[name] = _seconds(entry)
    return min(right, key=lambda name: right[name], default=None)


def _ratio(w: Result, name: str | None) -> float | None:
    naive, entry = _measured(w, NAIVE), _measured(w, name)
    return _seconds(naive) / _seconds(entry) if naive and entry else None


def _predicted(w: Result, name: str | None) -> float | None:
    naive, own = (w["predicted_seconds"].get(key) for key in (NAIVE, name))
    return naive / own if naive and own else None


def _naive_cell(w: Result) -> str:
    entry = _measured(w, NAIVE)
    if entry is None:
        return "-"
    return milliseconds(_seconds(entry)) + (", **wrong**" if entry["wrong"] else "")


def _speed_cell(w: Result, name: str) -> str:
    """The ratio to naive eager, or the error of an answer that is wrong."""
    entry, ratio = _measured(w, name), _ratio(w, name)
    if entry is None:
        return "-"
    if entry["wrong"]:
        return f"**wrong** by {error_text(entry['gradient_error'])}"
    if ratio is None:
        return "-"
    return ("~" if abs(ratio - 1) <= w["noise"]["both"] else "") + _ratio_text(ratio)


def _cast_cell(w: Result) -> str:
    """Naive code in the other dtype, float32 for half features and bfloat16 for the others."""
    name = next((n for n in (WIDE, HALF) if _measured(w, n)), None)
    return "-" if name is None else f"{name.removeprefix(NAIVE)[1:]} {_speed_cell(w, name)}"


def _package_cell(w: Result) -> str:
    cells = [f"{name} {_speed_cell(w, name)}" for name in PACKAGES if _measured(w, name)]
    return ", ".join(cells) or "-"


def _ours_cell(w: Result, name: str) -> str:
    entry = _measured(w, name)
    if entry is None or entry["wrong"]:
        return _speed_cell(w, name)
    return f"{milliseconds(_seconds(entry))}, **{_speed_cell(w, name)}**"


def _memory_cell(w: Result) -> str:
    naive, ours = _measured(w, NAIVE), _measured(w, _best(w))
    return f"{ours['memory']['both'] / naive['memory']['both']:.0%}" if naive and ours else "-"


def _roofline_cell(w: Result) -> str:
    ours, floor = _measured(w, _best(w)), w["floor_seconds"]
    return f"{floor / _seconds(ours):.0%}" if ours and floor else "-"


def _error_cell(w: Result) -> str:
    entries = (_measured(w, NAIVE), _measured(w, _best(w)))
    return " / ".join(error_text(e["gradient_error"]) if e else "-" for e in entries)


def _ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{_three_digits(ratio)}x"


def error_text(error: float | None) -> str:
    """One digit: "3e-7"."""
    return "NaN" if error is None else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def _not_measured(result: Result) -> list[str]:
    lines = [f"{p['name']}: {p['reason']}" for p in result["providers"] if p["reason"]]
    for w in result["workloads"]:
        if w["reason"]:
            lines.append(f"{_label(w)}: {w['reason']}")
        for name, entry in w["results"].items():
            if entry["reason"]:
                lines.append(f"{name}, {_label(w)}: {entry['reason']}")
    return lines


def _three_digits(number: float) -> str:
    """2.34, 23.4, 234 or 2340, never an exponent."""
    if number == 0 or not math.isfinite(number):
        return f"{number:.0f}"
    decimals = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:.{min(decimals, 4)}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
