"""Runs of the finetuning examples, whole and interrupted, and what they left."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.finetuning import checkpoints

ROOT = Path(__file__).parents[2]
QUICK = ("--device", "cpu", "--workers", "0", "--lr", "3e-3")
Main = Callable[[Sequence[str]], int]


def rows(out: Path) -> list[dict[str, float]]:
    """What metrics.csv has, without the times."""
    with (out / "metrics.csv").open() as file:
        found = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert all(row.pop("seconds") > 0 for row in found)
    return found


def state(out: Path) -> dict[str, Any]:
    """The newest checkpoint."""
    path = checkpoints.newest(out / "checkpoints")
    assert path is not None
    return checkpoints.load(path)


def column(out: Path, kind: str) -> list[float]:
    """Of metrics.csv the one whose name begins with this."""
    name = next(name for name in rows(out)[0] if name.startswith(kind))
    return [row[name] for row in rows(out)]


def stop_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run is interrupted before it has made this step."""
    calls = iter(range(1, step))
    plain = torch.amp.GradScaler.step

    def limited(self: torch.amp.GradScaler, *args: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return plain(self, *args, **named)

    monkeypatch.setattr(torch.amp.GradScaler, "step", limited)


def assert_resumes(main: Main, options: Sequence[str], folder: Path, stops: Sequence[int]) -> None:
    """Interrupted before each of these steps, in turn, a run ends where a whole one does."""
    whole, parts = folder / "whole", folder / "parts"
    main([*options, "--out", str(whole), "--save-every", "1"])
    for done, step in enumerate(stops):
        with pytest.MonkeyPatch.context() as patch:
            stop_in_step(patch, step - (int(state(parts)["progress"]["step"]) if done else 0))
            with pytest.raises(KeyboardInterrupt):
                main([*options, "--out", str(parts), "--save-every", "1", "--resume"])
    # A process that goes on has another past.
    torch.manual_seed(1234)
    main([*options, "--out", str(parts), "--save-every", "1", "--resume"])
    assert_same(state(parts), state(whole))
    assert rows(parts) == rows(whole)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the bit, in weights, moments of the optimiser and all else."""
    for kept in (one, other):
        for row in kept["progress"]["history"]:
            row.pop("seconds", None)
    assert plain(one) == plain(other)


def plain(value: Any) -> Any:
    """Something to compare with ==, in place of tensors."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """An example as users start it."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=100,
    )
