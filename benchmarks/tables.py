"""Results as Markdown tables, for the terminal and for the documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from .oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE
from .providers import HALF, HAND_DERIVED, NAIVE, OURS, PACKAGES, TF32, WIDE
from .schema import Benchmark, Outcome, Result, Workload
from .workloads import AUTOTUNED, CKA_MEASURES, COMPILED

# Titles of the measures in the first column.
_TITLES = {
    "cka_biased": "biased",
    "cka_debiased": "debiased",
    "procrustes": "Procrustes",
    "covariance": "covariance",
    "bures": "Bures",
}
WRONG = (
    f"**Wrong** is a value off by more than {VALUE_TOLERANCE} or a gradient off by more than "
    f"{GRADIENT_TOLERANCE:.0%}, at whatever speed."
)
FIXED_COSTS = (
    "A graph has forward and backward of inputs that together exceed the L2 cache twice. The "
    "host's time is until the calls return, without waiting for the device."
)


def summary(result: Benchmark) -> str:
    """A result's caption, its tables and what they lack."""
    measured = [w for w in result.workloads if w.reason is None]
    cka = [w for w in measured if w.measure in CKA_MEASURES]
    others = [w for w in measured if w.measure not in CKA_MEASURES]
    in_graphs = [w for w in measured if any(o.graph for o in w.results.values())]
    parts = [caption(result)]
    parts += ["Linear CKA:", _comparison(cka)] if cka else []
    parts += ["Other measures:", _comparison(others)] if others else []
    if in_graphs:
        parts += ["The device alone, in CUDA graphs, and what a call costs the host:"]
        parts += [_fixed_costs(in_graphs), FIXED_COSTS]
    missing = [f"{p.name}: {p.reason}" for p in result.providers if p.reason]
    for w in result.workloads:
        missing += [f"{_label(w)}: {w.reason}"] if w.reason else []
        reasons = ((name, outcome.reason) for name, outcome in w.results.items())
        missing += [f"{name}, {_label(w)}: {reason}" for name, reason in reasons if reason]
    return "\n\n".join([*parts, WRONG, *not_measured(missing)])


def best_and_worst(result: Benchmark) -> str:
    """A sentence for the README: the largest and the smallest ratio to right naive code."""
    ratios = {}
    for w in result.workloads:
        naive, ours = _measured(w, NAIVE), _measured(w, _best(w))
        if naive and ours and not naive.wrong:
            # No caption says here what is linear CKA.
            cka = " CKA" if w.measure in CKA_MEASURES else ""
            label = f"{_TITLES[w.measure]}{cka}, {w.shape}"
            ratios[label] = _seconds(naive) / _seconds(ours)
    where = f"On {result.environment.device}"
    if not ratios:
        return f"{where}, no workload was measured."
    best, worst = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    return (
        f"{where}, the best of {len(ratios)} workloads is {best}: "
        f"**{_ratio_text(ratios[best])}** as fast as naive code. The worst is {worst}: "
        f"**{_ratio_text(ratios[worst])}**."
    )


def not_measured(lines: Iterable[str]) -> list[str]:
    """A paragraph, or none."""
    items = "\n".join(f"- {line}" for line in dict.fromkeys(lines))
    return [f"Not measured:\n{items}"] if items else []


def predictions(workloads: Sequence[Workload]) -> str:
    """The predicted ratios to naive eager."""
    names = names_of(w.predicted_seconds for w in workloads)
    rows = [[_label(w), *(_ratio_text(_predicted(w, name)) for name in names)] for w in workloads]
    return markdown(["predicted ratio", *names], rows)


def caption(result: Result) -> str:
    """Hardware, versions, commit and date."""
    e = result.environment
    cpu = f"{e.cpu}, {_count(e.cores, 'core')}, {_count(e.threads, 'thread')}"
    hardware = f"{e.gpu} (driver {e.driver}), {cpu}" if e.gpu else cpu
    installed = ((name, version) for name, version in e.versions.items() if version is not None)
    versions = ", ".join(f"{name} {version}" for name, version in installed)
    commit = e.commit[:12] + (" with local changes" if e.dirty else "")
    return f"**{hardware}**, {e.system}; {versions}; commit {commit}; {e.date[:10]}."


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


def _comparison(workloads: Sequence[Workload]) -> str:
    """A row a workload; a column only for what one of the workloads has."""
    names = names_of(w.results for w in workloads)
    columns: dict[str, Callable[[Workload], str]] = {"features": _label, NAIVE: _naive_cell}
    if WIDE in names or HALF in names:
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
    if any(w.floor_seconds for w in workloads):
        columns["roofline"] = lambda w: _roofline(w, _measured(w, _best(w)), _seconds)
    columns["gradient error, naive / ours"] = _error_cell
    return markdown(list(columns), [[cell(w) for cell in columns.values()] for w in workloads])


def _fixed_costs(workloads: Sequence[Workload]) -> str:
    """Naive eager and our best side by side: seconds in a graph, seconds of the host, launches."""
    rows = []
    for w in workloads:
        ours = _measured(w, _best(w))
        outcomes = (_measured(w, NAIVE), ours)
        graphs = (milliseconds(o.graph.q50) if o and o.graph else "-" for o in outcomes)
        hosts = (milliseconds(o.seconds["host"].q50) if o else "-" for o in outcomes)
        launches = (str(o.launches) if o else "-" for o in outcomes)
        cells = map(" / ".join, (graphs, hosts, launches))
        rows.append([_label(w), *cells, _roofline(w, ours, _graph_seconds)])
    header = ["naive eager / ours", "graph", "host", "launches", "roofline in the graph"]
    return markdown(header, rows)


def names_of(entries: Iterable[Mapping[str, object]]) -> list[str]:
    """Keys of all entries, each once, in order."""
    return list(dict.fromkeys(name for entry in entries for name in entry))


def _label(w: Workload) -> str:
    return f"{_TITLES[w.measure]}, {w.shape}"


def _measured(w: Workload, name: str | None) -> Outcome | None:
    outcome = w.results.get(name or "")
    return outcome if outcome and outcome.reason is None else None


def _seconds(outcome: Outcome) -> float:
    return outcome.seconds["both"].q50


def _graph_seconds(outcome: Outcome) -> float | None:
    return outcome.graph.q50 if outcome.graph else None


def _best(w: Workload) -> str | None:
    """Our fastest backend, of those that are right."""
    ours = {name: _measured(w, name) for name in w.results if name.startswith(OURS)}
    right = {name: _seconds(o) for name, o in ours.items() if o and not o.wrong}
    return min(right, key=lambda name: right[name], default=None)


def _predicted(w: Workload, name: str | None) -> float | None:
    naive, own = (w.predicted_seconds.get(key or "") for key in (NAIVE, name))
    return naive / own if naive and own else None


def _naive_cell(w: Workload) -> str:
    outcome = _measured(w, NAIVE)
    if outcome is None:
        return "-"
    return milliseconds(_seconds(outcome)) + (", **wrong**" if outcome.wrong else "")


def _speed_cell(w: Workload, name: str) -> str:
    """The ratio to naive eager, or the error of an answer that is wrong."""
    naive, outcome = _measured(w, NAIVE), _measured(w, name)
    if outcome is None:
        return "-"
    if outcome.wrong:
        return f"**wrong** by {error_text(outcome.gradient_error)}"
    if naive is None:
        return "-"
    ratio = _seconds(naive) / _seconds(outcome)
    return ("~" if abs(ratio - 1) <= w.noise["both"] else "") + _ratio_text(ratio)


def _cast_cell(w: Workload) -> str:
    """Naive code in the other dtype, float32 for half features and bfloat16 for the others."""
    name = next((n for n in (WIDE, HALF) if _measured(w, n)), None)
    return "-" if name is None else f"{name.removeprefix(NAIVE)[1:]} {_speed_cell(w, name)}"


def _package_cell(w: Workload) -> str:
    cells = [f"{name} {_speed_cell(w, name)}" for name in PACKAGES if _measured(w, name)]
    return ", ".join(cells) or "-"


def _ours_cell(w: Workload, name: str) -> str:
    outcome, speed = _measured(w, name), _speed_cell(w, name)
    right = outcome and not outcome.wrong
    return f"{milliseconds(_seconds(outcome))}, **{speed}**" if outcome and right else speed


def _memory_cell(w: Workload) -> str:
    naive, ours = _measured(w, NAIVE), _measured(w, _best(w))
    return f"{ours.memory['both'] / naive.memory['both']:.0%}" if naive and ours else "-"


def _roofline(w: Workload, ours: Outcome | None, time: Callable[[Outcome], float | None]) -> str:
    seconds = time(ours) if ours else None
    return f"{w.floor_seconds / seconds:.0%}" if w.floor_seconds and seconds else "-"


def _error_cell(w: Workload) -> str:
    outcomes = (_measured(w, NAIVE), _measured(w, _best(w)))
    return " / ".join(error_text(o.gradient_error) if o else "-" for o in outcomes)


def _ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{_three_digits(ratio)}x"


def error_text(error: float | None) -> str:
    """One digit: "3e-7"."""
    return "NaN" if error is None else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def _three_digits(number: float) -> str:
    """2.34, 23.4, 234 or 2340, never an exponent."""
    if number == 0 or not math.isfinite(number):
        return f"{number:.0f}"
    decimals = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:.{min(decimals, 4)}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
