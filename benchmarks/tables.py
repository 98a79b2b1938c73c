"""Results as Markdown tables, for the terminal and for the documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from .oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE
from .providers import HALF, HAND_DERIVED, NAIVE, OURS, PACKAGES, TF32, WIDE
from .schema import Benchmark, ErrorCurve, Outcome, Result, Workload
from .workloads import AUTOTUNED, CKA_MEASURES, COMPILED

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
    for title, workloads in (("Linear CKA:", cka), ("Other measures:", others)):
        backends = [n for n in names_of(w.results for w in workloads) if n.startswith(OURS)]
        parts += [title, table([_cells(w, backends) for w in workloads])] if workloads else []
    if in_graphs:
        parts += ["The device alone, in CUDA graphs, and what a call costs the host:"]
        parts += [table(list(map(_fixed_costs, in_graphs))), FIXED_COSTS]
    missing = [f"{p.name}: {p.reason}" for p in result.providers if p.reason]
    missing += [line for w in result.workloads for line in reasons(_label(w), w)]
    return "\n\n".join([*parts, WRONG, *not_measured(missing)])


def best_and_worst(result: Benchmark) -> str:
    """A sentence for the README: the largest and the smallest ratio to right naive code."""
    ratios = {}
    for w in result.workloads:
        naive, ours = w.results.get(NAIVE), w.results.get(_best(w))
        if naive and ours and not (naive.reason or naive.wrong):
            # No caption says here what is linear CKA.
            cka = " CKA," if w.measure in CKA_MEASURES else ","
            ratios[_label(w).replace(",", cka, 1)] = _seconds(naive) / _seconds(ours)
    where = f"On {result.environment.device}"
    if not ratios:
        return f"{where}, no workload was measured."
    best, worst = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    last = f"takes **{_ratio(1 / ratios[worst])}** as long"
    last = last if ratios[worst] < 1 else f"is **{_ratio(ratios[worst])}** as fast"
    return (
        f"{where}, of {len(ratios)} workloads that naive code gets right, the best is {best}: "
        f"**{_ratio(ratios[best])}** as fast. The worst is {worst}, which {last}."
    )


def reasons(label: str, part: Workload | ErrorCurve) -> list[str]:
    """Why a part of a result, or a provider in it, was not measured."""
    own = [f"{label}: {part.reason}"] if isinstance(part, Workload) and part.reason else []
    return own + [f"{name}, {label}: {o.reason}" for name, o in part.results.items() if o.reason]


def not_measured(lines: Iterable[str]) -> list[str]:
    """A paragraph, or none."""
    items = "\n".join(f"- {line}" for line in dict.fromkeys(lines))
    return [f"Not measured:\n{items}"] if items else []


def caption(result: Result) -> str:
    """Hardware, versions, commit and date."""
    e = result.environment
    counts = ((e.cores, "core"), (e.threads, "thread"))
    cpu = ", ".join([e.cpu, *(f"{n} {noun}" + "s" * (n != 1) for n, noun in counts)])
    hardware = f"{e.gpu} (driver {e.driver}), {cpu}" if e.gpu else cpu
    versions = ", ".join(f"{name} {version}" for name, version in e.versions.items() if version)
    commit = e.commit[:12] + (" with local changes" if e.dirty else "")
    return f"**{hardware}**, {e.system}; {versions}; commit {commit}; {e.date[:10]}."


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text, too."""
    lines = [header, *rows]
    first, *others = (max(3, *(len(row[i]) for row in lines)) for i in range(len(header)))

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(first), *map(str.rjust, row[1:], others)]
        return "| " + " | ".join(cells) + " |"

    rule = "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])
    return "\n".join([line(header), rule, *map(line, rows)])


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A column only for what one of the rows has."""
    titles = [title for title in rows[0] if any(row.get(title) for row in rows)]
    return markdown(titles, [[row.get(title) or "-" for title in titles] for row in rows])


def _cells(w: Workload, backends: Sequence[str]) -> dict[str, str]:
    """A row by title, empty where there is nothing to say."""
    outcomes = {name: outcome for name, outcome in w.results.items() if not outcome.reason}
    naive, best = outcomes.get(NAIVE), _best(w)
    ours = outcomes.get(best)

    def speed(name: str) -> str:
        """The ratio to naive eager, or the error of an answer that is wrong."""
        outcome = outcomes.get(name)
        if outcome and outcome.wrong:
            return f"**wrong** by {error_text(outcome.gradient_error)}"
        if outcome is None or naive is None:
            return ""
        ratio = _seconds(naive) / _seconds(outcome)
        return ("~" if abs(ratio - 1) <= w.noise["both"] else "") + _ratio(ratio)

    def speeds(*names: str) -> str:
        return ", ".join(f"{n.removeprefix(NAIVE).strip()} {speed(n)}" for n in names if speed(n))

    def times(name: str) -> str:
        outcome, ratio = outcomes.get(name), speed(name)
        if outcome is None or outcome.wrong:
            return ratio
        return f"{milliseconds(_seconds(outcome))}, **{ratio or '-'}**"

    before, after = (w.predicted_seconds.get(name) for name in (NAIVE, best))
    return {
        "features": _label(w),
        NAIVE: milliseconds(_seconds(naive)) + ", **wrong**" * naive.wrong if naive else "",
        "naive in": speeds(WIDE, HALF),
        "TF32": speed(TF32),
        **{name: speed(name) for name in (COMPILED, AUTOTUNED, HAND_DERIVED)},
        "package": speeds(*PACKAGES),
        **{name: times(name) for name in backends},
        "predicted": _ratio(before / after) if before and after else "",
        "memory": f"{ours.memory['both'] / naive.memory['both']:.0%}" if naive and ours else "",
        "roofline": _share(w.floor_seconds, _seconds(ours) if ours else None),
        "gradient error, naive / ours": _both(naive, ours, lambda o: error_text(o.gradient_error)),
    }


def _fixed_costs(w: Workload) -> dict[str, str]:
    """Seconds in a graph, seconds of the host, and launches."""
    naive, ours = w.results.get(NAIVE), w.results.get(_best(w))
    graph = ours.graph.q50 if ours and ours.graph else None
    return {
        "naive eager / ours": _label(w),
        "graph": _both(naive, ours, lambda o: milliseconds(o.graph.q50) if o.graph else "-"),
        "host": _both(naive, ours, lambda o: milliseconds(o.seconds["host"].q50)),
        "launches": _both(naive, ours, lambda o: str(o.launches)),
        "roofline in the graph": _share(w.floor_seconds, graph),
    }


def _both(naive: Outcome | None, ours: Outcome | None, text: Callable[[Outcome], str]) -> str:
    return " / ".join(text(o) if o and not o.reason else "-" for o in (naive, ours))


def _share(floor: float | None, seconds: float | None) -> str:
    return f"{floor / seconds:.0%}" if floor and seconds else ""


def names_of(entries: Iterable[Mapping[str, object]]) -> list[str]:
    """Keys of all entries, each once, in order."""
    return list(dict.fromkeys(name for entry in entries for name in entry))


def _label(w: Workload) -> str:
    title = w.measure.removeprefix("cka_")
    return f"{title.title() if title in ('procrustes', 'bures') else title}, {w.shape}"


def _seconds(outcome: Outcome) -> float:
    return outcome.seconds["both"].q50


def _best(w: Workload) -> str:
    """Our fastest backend, of those that are right; empty if there is none."""
    ours = {n: o for n, o in w.results.items() if n.startswith(OURS) and not (o.reason or o.wrong)}
    return min(ours, key=lambda name: _seconds(ours[name]), default="")


def milliseconds(seconds: float) -> str:
    return f"{_three_digits(seconds * 1e3)} ms"


def _ratio(ratio: float) -> str:
    return f"{_three_digits(ratio)}x"


def _three_digits(number: float) -> str:
    """2.34, 23.4, 234 or 2340."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"


def error_text(error: float | None) -> str:
    """One digit: "3e-7"."""
    return "NaN" if error is None else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e+")
