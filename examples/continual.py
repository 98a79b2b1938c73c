"""Learn three tasks in sequence, with and without a RIFT loss, and measure the forgetting.

A small vision transformer learns the handwritten digits 0-3 from all images. Next come 4-6, rotated
by a quarter turn and inverted, and then 7-9, upside down, with ten images of each digit. All tasks
train one backbone. Every task has a separate head, which is frozen when its task ends; the task of
a test image is known. A RIFT loss compares with the frozen model after the previous task. The
alternatives are plain finetuning, also at lower learning rates, and a frozen backbone. Every method
has the same optimiser, steps, batches and seeds, and sees no image of an earlier task.

    python -m examples.continual
    python -m examples.continual --seeds 2 --out /tmp/continual   # a short run
    python -m examples.continual --report                         # write tables and picture again

Results for each method are the accuracy on all tasks after the last, and the average forgetting.
The latter is the best earlier accuracy minus the final one, averaged over all tasks but the last.
Both are measured with the tasks' own heads, and with linear classifiers refitted to the features.
Finished runs are stored in continual.jsonl, and the next start performs only missing ones. Writes
continual.json and continual.png.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .digits import data, evaluation, methods, model, pictures, sequence, training
from .digits.experiment import STOPPED, Experiment, Section, difference
from .digits.methods import GREY, MEASURES, PLAIN, PROBE, Plan
from .digits.runs import Job, Run
from .digits.sequence import Start, average, forgetting
from .digits.tables import cell
from .digits.training import LOWER_RATES, RATE

# With a head for each task, the best rate is lower; a frozen backbone is the limit of rate 0.
RATES = (RATE, *LOWER_RATES, RATE / 16, RATE / 32)
PLANS = (
    Plan(PROBE),
    *(Plan(PLAIN, 0.0, rate) for rate in RATES),
    *(Plan(method, weight) for method in ("cka", "covariance") for weight in (1.0, 3.0, 10.0)),
)
AVERAGE, FORGETTING = "all tasks, %", "forgetting"
HEADS = {"accuracy": "own heads", "refitted": "refitted"}
_NOTE = (
    "Values are from after the last task; forgetting is in points. The last column compares with "
    "plain finetuning at its best learning rate: the mean difference in accuracy on all tasks, in "
    "points, between runs of the same seed. `~` marks a difference that may be chance (paired "
    "t-test at 5%)."
)


def label(plan: Plan) -> str:
    return "frozen backbone" if plan.method == PROBE else str(plan)


def jobs(seeds: int) -> list[Job]:
    return [Job(seed, label(plan), plan._asdict()) for seed in range(seeds) for plan in PLANS]


def perform(start: Start, job: Job, steps: int) -> Run:
    return sequence.perform(start, Plan(**job.settings), steps)


def group(runs: Sequence[Run], heads: str) -> dict[Plan, list[Run]]:
    """The fields of tables and pictures by method; ``heads`` is a key of ``HEADS``."""
    groups: dict[Plan, list[Run]] = {plan: [] for plan in PLANS}
    for run in runs:
        accuracies = run[heads]
        fields = {f"task {j + 1}, %": value for j, value in enumerate(accuracies[-1])}
        fields |= {AVERAGE: average(accuracies), FORGETTING: forgetting(accuracies)}
        plan = Plan(run["method"], run["weight"], run["rate"])
        groups[plan].append({"seed": run["seed"], **fields})
    return groups


def best_plain(groups: dict[Plan, list[Run]]) -> Plan:
    """Plain finetuning at the learning rate with the best accuracy on all tasks."""
    plain = [plan for plan in groups if plan.method == PLAIN]
    return max(plain, key=lambda plan: pictures.mean_and_deviation(groups[plan], AVERAGE)[0])


def sections(runs: Sequence[Run]) -> list[Section]:
    """A table for the tasks' own heads, and one for refitted classifiers."""
    tables = []
    fields = [*(f"task {j + 1}, %" for j in range(len(data.TASKS))), AVERAGE, FORGETTING]
    for heads, title in HEADS.items():
        groups = group(runs, heads)
        baseline = best_plain(groups)
        rows = []
        for plan, plan_runs in groups.items():
            is_baseline = plan == baseline
            gap = "-" if is_baseline else difference(plan_runs, groups[baseline], AVERAGE)
            rows.append([label(plan), *(cell(plan_runs, field, 1) for field in fields), gap])
        tables.append(Section([title, *fields, "all, from plain"], rows))
    return tables


def draw(runs: Sequence[Run]) -> Figure:
    """A panel for each result, a row for each method."""
    figure = Figure(figsize=(13, 5.2), facecolor="white")
    panels = iter(figure.subplots(1, 2 * len(HEADS), sharey=True))
    figure.subplots_adjust(left=0.2, right=0.985, top=0.76, bottom=0.065, wspace=0.09)
    explanation = (
        f"Mean ± standard deviation, seeds: {len({run['seed'] for run in runs})}. "
        "Own heads: each task's, kept as it was after its task. "
        "Refitted: linear classifiers fitted to the final features."
    )
    title = "Three tasks in sequence: what is left after the last"
    pictures.add_title(figure, title, explanation, 0.012)
    for heads, subtitle in HEADS.items():
        groups = group(runs, heads)
        titles = {AVERAGE: "Accuracy on all tasks, %", FORGETTING: "Average forgetting, points"}
        for field, title in titles.items():
            axes = next(panels)
            for y, (plan, plan_runs) in enumerate(groups.items()):
                colour = MEASURES[plan.method].colour if plan.method in MEASURES else GREY
                pictures.draw_row(axes, y, plan_runs, field, colour)
            axes.set_title(f"{title}\n{subtitle}", loc="left", fontsize=11)
            pictures.simplify_axes(axes)
            axes.set_yticks(range(len(groups)), [label(plan) for plan in groups])
    axes.invert_yaxis()  # inverts all panels, which share the axis
    return figure


EXPERIMENT = Experiment(
    name="continual",
    doc=__doc__ or "",
    seeds=8,
    modules=(data, model, training, evaluation, methods, sequence),
    shared_settings=sequence.shared_settings,
    jobs=jobs,
    prepare=sequence.prepare,
    perform=perform,
    sections=sections,
    draw=draw,
    note=_NOTE,
    alt="Accuracy on all three tasks and average forgetting for each method of finetuning",
)

if __name__ == "__main__":
    try:
        raise SystemExit(EXPERIMENT.main())
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
