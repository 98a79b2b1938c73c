"""Finetune a small vision transformer on a few images, with and without a RIFT loss.

A transformer is pretrained on scikit-learn's handwritten digits 0-6. It is then finetuned on ten
images each of 7, 8 and 9, rotated by a quarter turn and inverted. The methods are plain finetuning,
finetuning with ``RIFTLoss`` added to the task loss, and a linear probe (frozen transformer, new
head). Each is measured by its accuracy on the new digits and its similarity to the pretrained
features (debiased CKA). A linear classifier, fitted to the features of the old digits, measures
what is kept. Every method has the same optimiser, steps, batches and seeds, and sees no old digit
during finetuning.

    python -m examples.finetune_digits
    python -m examples.finetune_digits --seeds 1 --weight 1                  # a short run
    python -m examples.finetune_digits --measure cka procrustes --out /tmp/demo

Writes tradeoff.png and results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import rift_kernels as rk

from .digits import training
from .digits.data import NEW, OLD, SHOTS, Data, draw_data
from .digits.evaluation import evaluate
from .digits.methods import GREY, MEASURES, PLAIN, PRETRAINED, PROBE, Plan
from .digits.model import SIZES, Transformer
from .digits.runs import HARDWARE, Run, commit, progress_bar, versions
from .digits.training import FINETUNING, LOWER_RATES, PRETRAINING, RATE, Tick, pretrain

NOT_FINETUNED = Plan(PRETRAINED, 0.0, 0.0)


def finetune(
    teacher: Transformer, data: Data, plan: Plan, seed: int, tick: Tick
) -> tuple[Transformer, float]:
    """Finetune a copy of the teacher; return it and the time of a step in ms."""
    method, weight, rate = plan
    rift = rk.RIFTLoss(method, weight=weight) if method in MEASURES else None
    recipe = FINETUNING._replace(rate=rate)
    frozen = method == PROBE
    return training.finetune(teacher, data.shots, len(NEW), rift, seed, recipe, tick, frozen=frozen)


def run_all(plans: Sequence[Plan], seeds: int, device: torch.device, console: Console) -> list[Run]:
    """Run every plan with every seed, with a progress bar, or a line per seed off a terminal."""
    runs = []
    with progress_bar(console) as bar:
        task = bar.add_task("", total=seeds * (PRETRAINING.steps + len(plans) * FINETUNING.steps))

        def tick() -> None:
            bar.advance(task)

        for seed in range(seeds):
            name = f"seed {seed + 1} of {seeds}"
            bar.update(task, description=f"{name}: pretraining")
            data = draw_data(seed, device)
            teacher = pretrain(data.pretraining, len(OLD), seed, tick=tick)
            unmeasured = {"new_accuracy": None, "step_ms": None}  # no head for the new digits yet
            settings = {**NOT_FINETUNED._asdict(), "seed": seed}
            runs.append(settings | evaluate(teacher, teacher, data) | unmeasured)
            for plan in plans:
                bar.update(task, description=f"{name}: {plan}")
                model, ms = finetune(teacher, data, plan, seed, tick)
                results = evaluate(model, teacher, data)
                runs.append({**plan._asdict(), "seed": seed, **results, "step_ms": ms})
            if not console.is_terminal:
                console.print(f"{name}: done")
    return runs


def mean_and_deviation(runs: Sequence[Run], plan: Plan, field: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; NaN for a field that was not measured."""
    values = [run[field] for run in runs if (run["method"], run["weight"], run["rate"]) == plan]
    if None in values:
        return math.nan, math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def print_table(runs: Sequence[Run], plans: Sequence[Plan], seeds: int, console: Console) -> None:
    rows = [NOT_FINETUNED, Plan(PROBE), Plan(PLAIN)]
    for method in dict.fromkeys(plan.method for plan in plans if plan.method in MEASURES):
        default = MEASURES[method].default_weight
        gaps = {p: abs(math.log(p.weight / default)) for p in plans if p.method == method}
        rows.append(min(gaps, key=gaps.__getitem__))
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("new digits\n%", "similarity\nCKA", "old digits\n%", "step\nms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in rows:
        cells = []
        for field, places in (("new_accuracy", 1), ("similarity", 2), ("old_accuracy", 1)):
            mean, deviation = mean_and_deviation(runs, plan, field)
            cells.append(f"{mean:.{places}f}" + f" ± {deviation:.{places}f}" * (seeds > 1))
        cells.append(f"{mean_and_deviation(runs, plan, 'step_ms')[0]:.1f}")
        table.add_row(str(plan), *("-" if "nan" in cell else cell for cell in cells))
    console.print(table)


def draw_curve(axes: Axes, runs: Sequence[Run], plans: Sequence[Plan], field: str) -> None:
    """Join the means, each with a cross of one standard deviation in every direction."""
    method = plans[0].method
    is_rift = method in MEASURES
    colour = MEASURES[method].colour if is_rift else GREY
    x, sd_x = np.array([mean_and_deviation(runs, plan, "new_accuracy") for plan in plans]).T
    y, sd_y = np.array([mean_and_deviation(runs, plan, field) for plan in plans]).T
    axes.errorbar(x, y, sd_y, sd_x, fmt="none", ecolor=colour, elinewidth=1, alpha=0.3, zorder=2)
    marker = {PLAIN: "s-", PROBE: "D-"}.get(method, "o-")
    label = f"+ RIFT, {MEASURES[method].label}" if is_rift else "_"  # others have annotations
    axes.plot(x, y, marker, color=colour, lw=2, ms=7, mec="white", zorder=3, label=label)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    sides = {"cka": ("right", (-7, -9)), PLAIN: ("right", (-8, -12))}
    side, shift = sides.get(method, ("left", (7, 5)))
    style: dict[str, Any] = {"ha": side, "color": colour, "fontsize": 9, "path_effects": halo}
    for plan, a, b in zip(plans, x, y, strict=True):
        note = f"rate / {RATE / plan.rate:g}" if plan.rate < RATE else method
        note = f"{plan.weight:g}" if plan.weight else note
        axes.annotate(note, (a, b), shift, textcoords="offset points", zorder=4, **style)


def draw_digits(figure: Figure, data: Data) -> None:
    """Draw an image of each class above the panels."""
    left = 0.075
    rows = ("Pretrained on", data.old_test), ("Finetuned on\n(7, 8, 9)", data.shots)
    for caption, (pixels, labels) in rows:
        figure.text(left, 0.855, caption, fontsize=11, va="center")
        left += 0.135
        for label in range(int(labels.max()) + 1):
            axes = figure.add_axes((left, 0.8, 0.058, 0.11))
            axes.imshow(pixels[labels == label][0, 0], cmap="gray_r", vmin=0, vmax=1)
            axes.axis("off")
            left += 0.061
        left += 0.03


def draw(runs: Sequence[Run], plans: Sequence[Plan], seeds: int, path: Path) -> None:
    """Draw what finetuning keeps against what it learns."""
    figure = Figure(figsize=(9, 6.1), facecolor="white")
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.73, bottom=0.09, wspace=0.17)
    title = "What finetuning keeps, against what it learns"
    figure.suptitle(title, x=0.075, ha="left", y=0.98, weight="bold", fontsize=13)
    draw_digits(figure, draw_data(0, torch.device("cpu")))
    titles = {
        "old_accuracy": "Accuracy kept on the old digits, %",
        "similarity": "Similarity to the pretrained model (CKA)",
    }
    for axes, (field, title) in zip(panels, titles.items(), strict=True):
        level = mean_and_deviation(runs, NOT_FINETUNED, field)[0]
        axes.axhline(level, color=GREY, lw=1, ls=":", zorder=1)
        for method in (PLAIN, PROBE, *MEASURES):
            if curve := [plan for plan in plans if plan.method == method]:
                draw_curve(axes, runs, curve, field)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("Accuracy on the new digits, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    key = "numbers: RIFT weight"
    if any(plan.method == PLAIN and plan.rate < RATE for plan in plans):
        key += "\nrate / n: plain, learning rate / n"
    if seeds > 1:
        key += f"\ncrosses: ± 1 sd, {seeds} seeds"
    legend = panels[0].legend(loc="lower left", frameon=False, fontsize=9.5, labelcolor="linecolor")
    legend.set_title(key, {"size": 9})
    legend.set_alignment("left")
    figure.savefig(path, dpi=160)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--measure", nargs="+", choices=tuple(MEASURES), default=["cka", "covariance"])
    weight_help = "only these weights, and plain finetuning at a single learning rate"
    add("--weight", nargs="+", type=float, help=weight_help)
    add("--seeds", type=int, default=5, help="number of seeds; default: %(default)s")
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    add("--device", help="default: cuda with a GPU, otherwise cpu")
    options = parser.parse_args(argv)
    for weight in options.weight or ():
        if not 0 < weight < math.inf:
            parser.error(f"argument --weight: must be a positive number, got {weight:g}")
    if options.seeds < 1:
        parser.error(f"argument --seeds: must be at least 1, got {options.seeds}")
    try:
        name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        options.device = torch.empty(0, device=name).device
        options.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).split("\n")[0])
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    plans = [Plan(PROBE), Plan(PLAIN)]
    plans += [] if options.weight else [Plan(PLAIN, 0.0, rate) for rate in LOWER_RATES]
    for method in dict.fromkeys(options.measure):
        weights = options.weight or MEASURES[method].weights
        plans += [Plan(method, weight) for weight in sorted(set(weights))]
    cuda = options.device.type == "cuda"
    hardware = torch.cuda.get_device_name(options.device) if cuda else HARDWARE
    console = Console(highlight=False)
    console.print(f"{len(plans)} finetunings a seed, seeds: {options.seeds}, on: {hardware}")
    start = time.perf_counter()
    # A model this small gains nothing from more threads, and loses much on a busy machine.
    with threadpool_limits(1):
        runs = run_all(plans, options.seeds, options.device, console)
    seconds = round(time.perf_counter() - start, 1)
    print_table(runs, plans, options.seeds, console)
    draw(runs, plans, options.seeds, options.out / "tradeoff.png")
    settings = {"seeds": options.seeds, "shots": SHOTS, **SIZES}
    settings |= {"steps": FINETUNING.steps, "batch": FINETUNING.batch}
    settings |= {"pretraining_steps": PRETRAINING.steps, "pretraining_rate": PRETRAINING.rate}
    record = {"hardware": hardware, "seconds": seconds, "versions": versions(), "commit": commit()}
    record |= {"settings": settings, "runs": runs}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    console.print(f"{seconds:.0f} s. Wrote tradeoff.png and results.json into {options.out}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; nothing was written") from None
