"""What a finetuning shows and writes of itself: bar, lines, CSV, TensorBoard, summary."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoints import Progress

_COMPARED = ("val_similarity/", "val_distance/")


def compared(row: Mapping[str, float]) -> dict[str, float]:
    """``similarity/<layer>`` or ``distance/<layer>`` on the validation data."""
    return {k.removeprefix("val_"): v for k, v in row.items() if k.startswith(_COMPARED)}


def summary(progress: Progress, out: Path) -> str:
    """What a run came to, in a few lines."""
    best = progress.history[progress.best_epoch - 1]
    lines = [
        f"{len(progress.history)} epochs, {progress.step} steps, "
        f"{sum(row['seconds'] for row in progress.history):.0f} s",
        f"best: epoch {progress.best_epoch}, accuracy {100 * progress.best:.1f}%",
        *(f"  {name}: {value:.3f}" for name, value in compared(best).items()),
        f"wrote {out / 'best'}, {out / 'metrics.csv'} and checkpoints to go on from",
    ]
    return "\n".join(lines)


def bar_of(progress: Progress, steps: int, options: argparse.Namespace, is_main: bool) -> Any:
    """Of an epoch; none where the output is no terminal."""
    return tqdm(
        desc=f"epoch {progress.epoch + 1}/{options.epochs}",
        total=steps,
        initial=progress.batch // options.accumulate,
        disable=None if is_main else True,
        leave=False,
    )


class Board:
    """TensorBoard, if it is asked for."""

    def __init__(self, out: Path, on: bool, step: int) -> None:
        self._writer: Any = None
        if on:
            from torch.utils.tensorboard import SummaryWriter

            # What a run that stopped logged beyond its checkpoint is not shown.
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


def line(row: Mapping[str, float], epochs: int) -> str:
    kept = compared(row)
    similar = ""
    if kept:
        kind = next(iter(kept)).partition("/")[0]
        similar = f", {kind} {sum(kept.values()) / len(kept):.3f}"
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: loss {row['train_loss']:.4f}, "
        f"validation accuracy {100 * row['val_accuracy']:.1f}%{similar}"
    )
