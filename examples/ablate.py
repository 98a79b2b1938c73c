"""What of a RIFT loss matters: one setting at a time is changed, around a base.

The task is that of examples/finetune_digits.py: a small vision transformer, pretrained on the
digits 0-6, is finetuned on ten images each of 7, 8 and 9, turned by a quarter and inverted. The
base is debiased CKA of weight 1 on batches of all 30 images. A factor is the measure, its weight,
the batch size, debiasing, the rotation of the covariance distance, or a lower learning rate instead
of a loss. It is no full product, so how two factors act together is not seen, except that weights
are tried for every measure, and batch sizes without a loss, with it, and with a biased one.

    python -m examples.ablate
    python -m examples.ablate --seeds 2 --out /tmp/ablations   # a look
    python -m examples.ablate --report                         # tables and picture once more

Every finished run is kept in ablations.jsonl, and a second start does what is missing there.
Writes ablations.json and ablations.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.demo import cell

from . import ablation, digits, finetune_digits, pictures, training
from .ablation import BATCHES, PLAIN, PRETRAINED, Plan, Start
from .command import STOPPED, Command, Section, difference
from .finetune_digits import GREY, MEASURES
from .runs import Job, Run
from .training import LOWER_RATES, RATE

BASE, UNREGULARISED, UNTRAINED = Plan(), Plan(PLAIN, 0.0), Plan(PRETRAINED, 0.0, rate=0.0)
BIASED, COVARIANCE = Plan(debiased=False), Plan("covariance")
BIASED_COLOUR = "#b45309"
ROTATIONS = ("identity", "learned", "optimal")

_FIELDS = {"new_accuracy": "New task, %", "old_accuracy": "Old task kept, %"}
_CELLS = {"new_accuracy": 1, "old_accuracy": 1, "similarity": 2}
_HEADER = ("new task, %", "old task kept, %", "similarity")
_NOTE = (
    "The last two columns of a table are mean differences of the new and of the old task, in "
    "points, between runs of the same seed; `~` marks one that may be chance (paired t-test at 5%; "
    "of so many, some that are chance pass)."
)


class Row(NamedTuple):
    """A line of a table; ``other`` is what it is compared with."""

    label: str
    plan: Plan
    other: Plan | None = None

    def gap(self, runs: Sequence[Run], field: str) -> str:
        """The difference from the other, if there is one."""
        if self.other is None or self.other == self.plan:
            return "-"
        return difference(of(runs, self.plan), of(runs, self.other), field)


class Factor(NamedTuple):
    """What is varied, in words what that is compared with, and the ways."""

    title: str
    against: str
    rows: list[Row]


def at_default(way: str) -> Plan:
    """A measure at the weight that the demo's table has, the second of its grid."""
    return Plan(way, MEASURES[way][2][1])


def factors() -> list[Factor]:
    """All that is run."""
    rates = [UNREGULARISED._replace(rate=rate) for rate in LOWER_RATES]
    no_loss = [Row("pretrained", UNTRAINED), Row("plain", UNREGULARISED, BASE)]
    no_loss += [Row(f"plain, learning rate / {RATE / p.rate:g}", p, BASE) for p in rates]
    no_loss.append(Row("base: debiased CKA, weight 1", BASE))
    measures = [Row(_name(plan), plan, BASE) for plan in map(at_default, MEASURES)]
    grid = [Plan(way, weight) for way, (_, _, weights) in MEASURES.items() for weight in weights]
    weights = [Row(_name(plan), plan, UNREGULARISED) for plan in grid]
    batches, debiasing = [], []
    for batch in BATCHES:
        plain, debiased, biased = (p._replace(batch=batch) for p in (UNREGULARISED, BASE, BIASED))
        batches.append(Row(f"plain, batch {batch}", plain))
        batches.append(Row(f"debiased CKA, batch {batch}", debiased, plain))
        debiasing.append(Row(f"debiased CKA, batch {batch}", debiased))
        debiasing.append(Row(f"biased CKA, batch {batch}", biased, debiased))
    rotations = [
        Row(f"{rotation}, weight {weight:g}", plan._replace(rotation=rotation), plan)
        for weight in (1.0, 10.0)
        for plan in (Plan("covariance", weight),)
        for rotation in ROTATIONS
    ]
    return [
        Factor("No loss", "base", no_loss),
        Factor("Measure", "base", measures),
        Factor("Weight", "plain", weights),
        Factor("Batch size", "plain", batches),
        Factor("Debiasing", "debiased", debiasing),
        Factor("Rotation of the covariance", "identity", rotations),
    ]


def _name(plan: Plan) -> str:
    return f"{MEASURES[plan.way][0]}, weight {plan.weight:g}"


def plans() -> dict[Plan, str]:
    """Each once, with a name."""
    return {row.plan: row.label for factor in factors() for row in factor.rows}


def jobs(seeds: int) -> list[Job]:
    named = plans().items()
    return [Job(seed, label, plan._asdict()) for seed in range(seeds) for plan, label in named]


def perform(begun: Start, job: Job, steps: int) -> Run:
    return ablation.perform(begun, Plan(**job.settings), steps)


def of(runs: Sequence[Run], plan: Plan) -> list[Run]:
    return [run for run in runs if all(run[key] == value for key, value in plan._asdict().items())]


def sections(runs: Sequence[Run]) -> list[Section]:
    """A table a factor."""
    found = []
    for title, against, rows in factors():
        cells = []
        for row in rows:
            these = of(runs, row.plan)
            line = [row.label, *(cell(these, field, places) for field, places in _CELLS.items())]
            cells.append([*line, *(row.gap(runs, field) for field in _FIELDS)])
        gaps = [f"{task}, from {against}" for task in ("new", "old")]
        found.append(Section([title, *_HEADER, *gaps], cells))
    return found


def draw(runs: Sequence[Run]) -> Figure:
    """Small multiples: a column a factor, a row an accuracy."""
    figure = Figure(figsize=(13, 6.4), facecolor="white")
    widths = {"width_ratios": [1.5, 1.5, 1.3, 0.85, 1.1]}
    panels = figure.subplots(2, len(_COLUMNS), sharey="row", sharex="col", gridspec_kw=widths)
    figure.subplots_adjust(left=0.055, right=0.99, top=0.8, bottom=0.1, hspace=0.1, wspace=0.08)
    seeds = len({run["seed"] for run in runs})
    words = (
        f"Mean ± standard deviation, seeds: {seeds}. Line: no loss; dotted: pretrained. "
        "Base: debiased CKA, weight 1, all 30 images a batch.\n"
        "One factor is changed at a time; the scales of the two rows differ."
    )
    pictures.begin(figure, "What of a RIFT loss matters", words, 0.055)
    for row, (field, title) in zip(panels, list(_FIELDS.items())[::-1], strict=True):
        row[0].set_ylabel(title, fontsize=11)
        for axes, panel in zip(row, _COLUMNS.values(), strict=True):
            pictures.level(axes, of(runs, UNREGULARISED), field, "-")
            pictures.level(axes, of(runs, UNTRAINED), field, ":")
            pictures.plain_axes(axes)
            panel(axes, runs, field)
    for axes, title in zip(panels[0], _COLUMNS, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
    low, high = panels[1, 0].get_ylim()
    panels[1, 0].set_ylim(low - 0.35 * (high - low), high)  # room for the legends
    return figure


def _dots(axes: Axes, runs: Sequence[Run], field: str, shown: dict[str, tuple[Plan, str]]) -> None:
    """Plans under their names, in a colour each."""
    for x, (plan, colour) in enumerate(shown.values()):
        pictures.line(axes, [x], [of(runs, plan)], field, colour)
    axes.set_xticks(range(len(shown)), shown, fontsize=8)
    axes.set_xlim(-0.6, len(shown) - 0.4)


def _measures(axes: Axes, runs: Sequence[Run], field: str) -> None:
    shown = {}
    for way, (name, colour, _) in MEASURES.items():
        plan = at_default(way)
        shown[f"{name.removeprefix('debiased ')}\n{plan.weight:g}"] = plan, colour
    _dots(axes, runs, field, shown)


def _weights(axes: Axes, runs: Sequence[Run], field: str) -> None:
    for i, (way, (name, colour, grid)) in enumerate(MEASURES.items()):
        x = [weight * 1.06 ** (i - 1.5) for weight in grid]  # so that the bars can be told apart
        groups = [of(runs, Plan(way, weight)) for weight in grid]
        pictures.line(axes, x, groups, field, colour, label=name)
    ticks = sorted({weight for _, _, grid in MEASURES.values() for weight in grid})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{weight:g}" for weight in ticks])
    axes.minorticks_off()
    _explained(axes, field, "weight")


def _batches(axes: Axes, runs: Sequence[Run], field: str) -> None:
    lines = (
        ("plain", UNREGULARISED, GREY, "s-"),
        ("debiased CKA", BASE, MEASURES["cka"][1], "o-"),
        ("biased CKA", BIASED, BIASED_COLOUR, "D--"),
    )
    for i, (name, plan, colour, marker) in enumerate(lines):
        groups = [of(runs, plan._replace(batch=batch)) for batch in BATCHES]
        x = [batch + 0.4 * (i - 1) for batch in BATCHES]
        pictures.line(axes, x, groups, field, colour, marker, name)
    axes.set_xticks(BATCHES)
    _explained(axes, field, "images a batch")


def _explained(axes: Axes, field: str, x: str) -> None:
    """In the lower row: what is on the axis, and a legend."""
    if field == "new_accuracy":
        axes.set_xlabel(x)
        axes.legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="lower left")


def _debiasing(axes: Axes, runs: Sequence[Run], field: str) -> None:
    shown = {"debiased": (BASE, MEASURES["cka"][1]), "biased": (BIASED, BIASED_COLOUR)}
    _dots(axes, runs, field, shown)


def _rotations(axes: Axes, runs: Sequence[Run], field: str) -> None:
    colour = MEASURES["covariance"][1]
    _dots(axes, runs, field, {r: (COVARIANCE._replace(rotation=r), colour) for r in ROTATIONS})


_COLUMNS = {
    "Measure, at a weight": _measures,
    "Weight": _weights,
    "Batch size": _batches,
    "Debiasing (CKA)": _debiasing,
    "Rotation (covariance)": _rotations,
}

COMMAND = Command(
    name="ablations",
    doc=__doc__ or "",
    seeds=7,
    modules=(digits, training, finetune_digits, ablation),
    shared=ablation.shared,
    jobs=jobs,
    begin=ablation.begin,
    perform=perform,
    sections=sections,
    draw=draw,
    note=_NOTE,
    alt="Old task kept and accuracy on the new task, by measure, weight, batch size, debiasing "
    "and rotation",
)

if __name__ == "__main__":
    try:
        raise SystemExit(COMMAND.main())
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
