"""Which settings of a RIFT loss matter: vary one setting of a base at a time.

The task is that of examples/finetune_digits.py. A small vision transformer is pretrained on the
digits 0-6. It is finetuned on ten images each of 7, 8 and 9, rotated by a quarter turn and
inverted. The base is debiased CKA of weight 1 on batches of all 30 images. The factors are the
measure, its weight, the batch size, debiasing, and the rotation of the covariance distance; lower
learning rates without a loss are compared, too. The design is not factorial, so most interactions
between factors are not measured. Two are: every measure has several weights, and every batch size
runs without a loss, with the base, and with biased CKA.

    python -m examples.ablate
    python -m examples.ablate --seeds 2 --out /tmp/ablations   # a short run
    python -m examples.ablate --report                         # write tables and picture again

Finished runs are stored in ablations.jsonl, and the next start performs only missing ones. Writes
ablations.json and ablations.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .digits import ablation, data, evaluation, methods, model, pictures, training
from .digits.ablation import BATCHES, Plan, Start
from .digits.experiment import STOPPED, Experiment, Section, difference
from .digits.methods import GREY, MEASURES, PLAIN, PRETRAINED
from .digits.runs import Job, Run
from .digits.tables import cell
from .digits.training import LOWER_RATES, RATE

BASE, UNREGULARISED, NOT_FINETUNED = Plan(), Plan(PLAIN, 0.0), Plan(PRETRAINED, 0.0, rate=0.0)
BIASED, COVARIANCE = Plan(debiased=False), Plan("covariance")
BIASED_COLOUR = "#b45309"
ROTATIONS = ("identity", "learned", "optimal")

_FIELDS = {"new_accuracy": "New task, %", "old_accuracy": "Old task kept, %"}
_CELLS = {"new_accuracy": 1, "old_accuracy": 1, "similarity": 2}
_HEADER = ("new task, %", "old task kept, %", "similarity")
_NOTE = (
    "The last two columns of each table are mean differences on the new and the old task, in "
    "points, between runs of the same seed. `~` marks a difference that may be chance (paired "
    "t-test at 5%; with so many tests, some chance differences pass)."
)


class Row(NamedTuple):
    """A line of a table, and the plan that it is compared with."""

    label: str
    plan: Plan
    baseline: Plan | None = None

    def gap(self, runs: Sequence[Run], field: str) -> str:
        """The difference from the baseline, if any."""
        if self.baseline is None or self.baseline == self.plan:
            return "-"
        return difference(select(runs, self.plan), select(runs, self.baseline), field)


class Factor(NamedTuple):
    """A setting that varies: its table's title, the name of the baseline, and the rows."""

    title: str
    baseline: str
    rows: list[Row]


def with_default_weight(method: str) -> Plan:
    """A measure at its default weight."""
    return Plan(method, MEASURES[method].default_weight)


def factors() -> list[Factor]:
    """All factors of the experiment."""
    rates = [UNREGULARISED._replace(rate=rate) for rate in LOWER_RATES]
    no_loss = [Row("pretrained", NOT_FINETUNED), Row("plain", UNREGULARISED, BASE)]
    no_loss += [Row(f"plain, learning rate / {RATE / p.rate:g}", p, BASE) for p in rates]
    no_loss.append(Row("base: debiased CKA, weight 1", BASE))
    measures = [Row(_name(plan), plan, BASE) for plan in map(with_default_weight, MEASURES)]
    grid = [
        Plan(method, weight) for method, measure in MEASURES.items() for weight in measure.weights
    ]
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
    return f"{MEASURES[plan.method].label}, weight {plan.weight:g}"


def plans() -> dict[Plan, str]:
    """Every plan once, with a label."""
    return {row.plan: row.label for factor in factors() for row in factor.rows}


def jobs(seeds: int) -> list[Job]:
    labels = plans().items()
    return [Job(seed, label, plan._asdict()) for seed in range(seeds) for plan, label in labels]


def perform(start: Start, job: Job, steps: int) -> Run:
    return ablation.perform(start, Plan(**job.settings), steps)


def select(runs: Sequence[Run], plan: Plan) -> list[Run]:
    """The runs of a plan."""
    return [run for run in runs if all(run[key] == value for key, value in plan._asdict().items())]


def sections(runs: Sequence[Run]) -> list[Section]:
    """One table for each factor."""
    tables = []
    for title, baseline, rows in factors():
        lines = []
        for row in rows:
            plan_runs = select(runs, row.plan)
            cells = (cell(plan_runs, field, places) for field, places in _CELLS.items())
            lines.append([row.label, *cells, *(row.gap(runs, field) for field in _FIELDS)])
        gaps = [f"{task}, from {baseline}" for task in ("new", "old")]
        tables.append(Section([title, *_HEADER, *gaps], lines))
    return tables


def draw(runs: Sequence[Run]) -> Figure:
    """Small multiples: a column for each factor, a row for each accuracy."""
    figure = Figure(figsize=(13, 6.4), facecolor="white")
    widths = {"width_ratios": [1.5, 1.5, 1.3, 0.85, 1.1]}
    panels = figure.subplots(2, len(_COLUMNS), sharey="row", sharex="col", gridspec_kw=widths)
    figure.subplots_adjust(left=0.055, right=0.99, top=0.8, bottom=0.1, hspace=0.1, wspace=0.08)
    seeds = len({run["seed"] for run in runs})
    explanation = (
        f"Mean ± standard deviation, seeds: {seeds}. Line: no loss; dotted: pretrained. "
        "Base: debiased CKA, weight 1, all 30 images per batch.\n"
        "One factor is changed at a time; the scales of the two rows differ."
    )
    pictures.add_title(figure, "Which settings of a RIFT loss matter", explanation, 0.055)
    for row, (field, title) in zip(panels, list(_FIELDS.items())[::-1], strict=True):
        row[0].set_ylabel(title, fontsize=11)
        for axes, panel in zip(row, _COLUMNS.values(), strict=True):
            pictures.draw_level(axes, select(runs, UNREGULARISED), field, "-")
            pictures.draw_level(axes, select(runs, NOT_FINETUNED), field, ":")
            pictures.simplify_axes(axes)
            panel(axes, runs, field)
    for axes, title in zip(panels[0], _COLUMNS, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
    low, high = panels[1, 0].get_ylim()
    panels[1, 0].set_ylim(low - 0.35 * (high - low), high)  # room for the legends
    return figure


def _draw_dots(
    axes: Axes, runs: Sequence[Run], field: str, styles: dict[str, tuple[Plan, str]]
) -> None:
    """Draw a dot for each plan and colour, above its label."""
    for x, (plan, colour) in enumerate(styles.values()):
        pictures.draw_line(axes, [x], [select(runs, plan)], field, colour)
    axes.set_xticks(range(len(styles)), styles, fontsize=8)
    axes.set_xlim(-0.6, len(styles) - 0.4)


def _draw_measures(axes: Axes, runs: Sequence[Run], field: str) -> None:
    styles = {}
    for method, (label, colour, _) in MEASURES.items():
        plan = with_default_weight(method)
        styles[f"{label.removeprefix('debiased ')}\n{plan.weight:g}"] = plan, colour
    _draw_dots(axes, runs, field, styles)


def _draw_weights(axes: Axes, runs: Sequence[Run], field: str) -> None:
    for i, (method, (label, colour, weights)) in enumerate(MEASURES.items()):
        x = [weight * 1.06 ** (i - 1.5) for weight in weights]  # keeps the bars apart
        groups = [select(runs, Plan(method, weight)) for weight in weights]
        pictures.draw_line(axes, x, groups, field, colour, label=label)
    ticks = sorted({weight for measure in MEASURES.values() for weight in measure.weights})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{weight:g}" for weight in ticks])
    axes.minorticks_off()
    _explain(axes, field, "weight")


def _draw_batches(axes: Axes, runs: Sequence[Run], field: str) -> None:
    lines = (
        ("plain", UNREGULARISED, GREY, "s-"),
        ("debiased CKA", BASE, MEASURES["cka"].colour, "o-"),
        ("biased CKA", BIASED, BIASED_COLOUR, "D--"),
    )
    for i, (label, plan, colour, marker) in enumerate(lines):
        groups = [select(runs, plan._replace(batch=batch)) for batch in BATCHES]
        x = [batch + 0.4 * (i - 1) for batch in BATCHES]
        pictures.draw_line(axes, x, groups, field, colour, marker, label)
    axes.set_xticks(BATCHES)
    _explain(axes, field, "images per batch")


def _explain(axes: Axes, field: str, label: str) -> None:
    """Label the axis and add a legend, in the lower row only."""
    if field == "new_accuracy":
        axes.set_xlabel(label)
        axes.legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="lower left")


def _draw_debiasing(axes: Axes, runs: Sequence[Run], field: str) -> None:
    styles = {"debiased": (BASE, MEASURES["cka"].colour), "biased": (BIASED, BIASED_COLOUR)}
    _draw_dots(axes, runs, field, styles)


def _draw_rotations(axes: Axes, runs: Sequence[Run], field: str) -> None:
    colour = MEASURES["covariance"].colour
    styles = {rotation: (COVARIANCE._replace(rotation=rotation), colour) for rotation in ROTATIONS}
    _draw_dots(axes, runs, field, styles)


_COLUMNS = {
    "Measure, at a weight": _draw_measures,
    "Weight": _draw_weights,
    "Batch size": _draw_batches,
    "Debiasing (CKA)": _draw_debiasing,
    "Rotation (covariance)": _draw_rotations,
}

EXPERIMENT = Experiment(
    name="ablations",
    doc=__doc__ or "",
    seeds=7,
    modules=(data, model, training, evaluation, methods, ablation),
    shared_settings=ablation.shared_settings,
    jobs=jobs,
    prepare=ablation.prepare,
    perform=perform,
    sections=sections,
    draw=draw,
    note=_NOTE,
    alt="Old task kept and accuracy on the new task, by measure, weight, batch size, debiasing "
    "and rotation",
)

if __name__ == "__main__":
    try:
        raise SystemExit(EXPERIMENT.main())
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
