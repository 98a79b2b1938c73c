"""The output of a finetuning: progress bar, lines, CSV, TensorBoard and summary."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoints import Progress

_COMPARED = ("val_similarity/", "val_distance/")


def compared_layers(row: Mapping[str, float]) -> dict[str, float]:
    """``similarity/<layer>`` or ``distance/<layer>`` on the validation data."""
    return {k.removeprefix("val_"): v for k, v in row.items() if k.startswith(_COMPARED)}


def summary(progress: Progress, out: Path) -> str:
    """The results of a run, in a few lines."""
    best = progress.history[progress.best_epoch - 1]
    lines = [
        f"{len(progress.history)} epochs, {progress.step} steps, "
        f"{sum(row['seconds'] for row in progress.history):.0f} s",
        f"best: epoch {progress.best_epoch}, accuracy {100 * progress.best:.1f}%",
        *(f"  {name}: {value:.3f}" for name, value in compared_layers(best).items()),
        f"wrote {out / 'best'}, {out / 'metrics.csv'} and checkpoints to resume from",
    ]
    return "\n".join(lines)


def progress_bar(progress: Progress, steps: int, options: argparse.Namespace, is_main: bool) -> Any:
    """The bar of an epoch, which is hidden if the output is not a terminal."""
    return tqdm(
        desc=f"epoch {progress.epoch + 1}/{options.epochs}",
        total=steps,
        initial=progress.batch // options.accumulate,
        disable=None if is_main else True,
        leave=False,
    )


class Board:
    """TensorBoard, or nothing if it is not enabled."""

    def __init__(self, out: Path, enabled: bool, step: int) -> None:
        self._writer: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            # Entries that an interrupted run logged after its last checkpoint are hidden.
            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)


def write_rows(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    layers = compared_layers(row)
    comparison = ""
    if layers:
        kind = next(iter(layers)).partition("/")[0]
        comparison = f", {kind} {sum(layers.values()) / len(layers):.3f}"
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: loss {row['train_loss']:.4f}, "
        f"validation accuracy {100 * row['val_accuracy']:.1f}%{comparison}"
    )
