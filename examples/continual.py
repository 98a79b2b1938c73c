"""Three tasks one after the other: what is left of the first ones, with and without a RIFT loss.

A small vision transformer learns the handwritten digits 0-3 from all images, then 4-6, turned by a
quarter and inverted, and then 7-9, upside down, from ten images each. The backbone goes on; every
task has a head of its own, which is kept as it is when its task is over, and a test image's task is
known. A RIFT loss compares with the model after the task before, frozen. Beside it: plain
finetuning, the same at lower learning rates, and a frozen backbone. Every way has the same
optimiser, steps, batches and seeds, and sees no image of an earlier task.

    python -m examples.continual
    python -m examples.continual --seeds 2 --out /tmp/continual   # a look
    python -m examples.continual --report                         # tables and picture once more

Shown of each way: the accuracy on all tasks after the last, and the average forgetting, which is
how much less that is than the best before, over all tasks but the last; both by the kept heads, and
by linear classifiers fitted anew to the features. Every finished run is kept in continual.jsonl,
and a second start does what is missing there. Writes continual.json and continual.png.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.demo import cell

from . import digits, finetune_digits, pictures, sequence, training
from .command import STOPPED, Command, Section, difference
from .finetune_digits import GREY, MEASURES, PLAIN, PROBE, Plan
from .runs import Job, Run
from .sequence import Start, average, forgetting
from .training import LOWER_RATES, RATE

# Own heads ask for lower rates than one new task does; the limit is the frozen backbone.
RATES = (RATE, *LOWER_RATES, RATE / 16, RATE / 32)
WAYS = (
    Plan(PROBE),
    *(Plan(PLAIN, 0.0, rate) for rate in RATES),
    *(Plan(way, weight) for way in ("cka", "covariance") for weight in (1.0, 3.0, 10.0)),
)
AVERAGE, FORGETTING = "all tasks, %", "forgetting"
HEADS = {"accuracy": "own heads", "refitted": "refitted"}
_NOTE = (
    "After the last task; forgetting in points. The last column is the mean difference of the "
    "accuracy on all tasks, in points, between runs of the same seed, from the learning rate of "
    "plain finetuning at which it is best; `~` marks one that may be chance (paired t-test at 5%)."
)


def name(plan: Plan) -> str:
    return "frozen backbone" if plan.way == PROBE else str(plan)


def jobs(seeds: int) -> list[Job]:
    return [Job(seed, name(plan), plan._asdict()) for seed in range(seeds) for plan in WAYS]


def perform(begun: Start, job: Job, steps: int) -> Run:
    return sequence.perform(begun, Plan(**job.settings), steps)


def grouped(runs: Sequence[Run], which: str) -> dict[Plan, list[Run]]:
    """The runs of each way, with what is reported of ``"accuracy"`` or ``"refitted"``."""
    found: dict[Plan, list[Run]] = {plan: [] for plan in WAYS}
    for run in runs:
        accuracies = run[which]
        fields = {f"task {j + 1}, %": value for j, value in enumerate(accuracies[-1])}
        fields |= {AVERAGE: average(accuracies), FORGETTING: forgetting(accuracies)}
        plan = Plan(run["way"], run["weight"], run["rate"])
        found[plan].append({"seed": run["seed"], **fields})
    return found


def best_plain(ways: dict[Plan, list[Run]]) -> Plan:
    """The learning rate at which plain finetuning is best at all tasks."""
    plain = [plan for plan in ways if plan.way == PLAIN]
    return max(plain, key=lambda plan: pictures.statistics(ways[plan], AVERAGE)[0])


def sections(runs: Sequence[Run]) -> list[Section]:
    """A table by the heads that were kept, and one by new ones."""
    found = []
    fields = [*(f"task {j + 1}, %" for j in range(len(digits.TASKS))), AVERAGE, FORGETTING]
    for which, title in HEADS.items():
        ways = grouped(runs, which)
        other = best_plain(ways)
        rows = []
        for plan, these in ways.items():
            gap = "-" if plan == other else difference(these, ways[other], AVERAGE)
            rows.append([name(plan), *(cell(these, field, 1) for field in fields), gap])
        found.append(Section([title, *fields, "all, from plain"], rows))
    return found


def draw(runs: Sequence[Run]) -> Figure:
    """A panel for each number, a row for each way."""
    figure = Figure(figsize=(13, 5.2), facecolor="white")
    panels = iter(figure.subplots(1, 2 * len(HEADS), sharey=True))
    figure.subplots_adjust(left=0.2, right=0.985, top=0.76, bottom=0.065, wspace=0.09)
    words = (
        f"Mean ± standard deviation, seeds: {len({run['seed'] for run in runs})}. "
        "Own heads: each task's, kept as it was after its task. "
        "Refitted: linear classifiers fitted to the features as they are then."
    )
    pictures.begin(figure, "Three tasks in sequence: what is left after the last", words, 0.012)
    for which, heads in HEADS.items():
        ways = grouped(runs, which)
        titles = {AVERAGE: "Accuracy on all tasks, %", FORGETTING: "Average forgetting, points"}
        for field, title in titles.items():
            axes = next(panels)
            for y, (plan, these) in enumerate(ways.items()):
                colour = MEASURES[plan.way][1] if plan.way in MEASURES else GREY
                pictures.row(axes, y, these, field, colour)
            axes.set_title(f"{title}\n{heads}", loc="left", fontsize=11)
            pictures.plain_axes(axes)
            axes.set_yticks(range(len(ways)), [name(plan) for plan in ways])
    axes.invert_yaxis()  # of all: they share it
    return figure


COMMAND = Command(
    name="continual",
    doc=__doc__ or "",
    seeds=8,
    modules=(digits, training, finetune_digits, sequence),
    shared=sequence.shared,
    jobs=jobs,
    begin=sequence.begin,
    perform=perform,
    sections=sections,
    draw=draw,
    note=_NOTE,
    alt="Accuracy on all three tasks and average forgetting, of each way of finetuning",
)

if __name__ == "__main__":
    try:
        raise SystemExit(COMMAND.main())
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
