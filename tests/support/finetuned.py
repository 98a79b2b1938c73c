"""Runs of the finetuning examples, uninterrupted or not, and the files that they leave."""

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
    """The rows of metrics.csv, without the times."""
    with (out / "metrics.csv").open() as file:
        metrics = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert all(row.pop("seconds") > 0 for row in metrics)
    return metrics


def state(out: Path) -> dict[str, Any]:
    """The newest checkpoint."""
    path = checkpoints.newest(out / "checkpoints")
    assert path is not None
    return checkpoints.load(path)


def column(out: Path, kind: str) -> list[float]:
    """The column of metrics.csv whose name begins with ``kind``."""
    name = next(name for name in rows(out)[0] if name.startswith(kind))
    return [row[name] for row in rows(out)]


def stop_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the next run before it makes this step."""
    calls = iter(range(1, step))
    original = torch.amp.GradScaler.step

    def limited(self: torch.amp.GradScaler, *args: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return original(self, *args, **named)

    monkeypatch.setattr(torch.amp.GradScaler, "step", limited)


def assert_resumes(main: Main, options: Sequence[str], folder: Path, stops: Sequence[int]) -> None:
    """A run that is interrupted before each of these steps ends like an uninterrupted run."""
    whole, parts = folder / "whole", folder / "parts"
    main([*options, "--out", str(whole), "--save-every", "1"])
    for done, step in enumerate(stops):
        with pytest.MonkeyPatch.context() as patch:
            stop_in_step(patch, step - (int(state(parts)["progress"]["step"]) if done else 0))
            with pytest.raises(KeyboardInterrupt):
                main([*options, "--out", str(parts), "--save-every", "1", "--resume"])
    # A resumed process has another random state.
    torch.manual_seed(1234)
    main([*options, "--out", str(parts), "--save-every", "1", "--resume"])
    assert_same(state(parts), state(whole))
    assert rows(parts) == rows(whole)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Checkpoints are bitwise equal in weights, optimiser state and everything else."""
    for checkpoint in (first, second):
        for row in checkpoint["progress"]["history"]:
            row.pop("seconds", None)
    assert plain(first) == plain(second)


def plain(value: Any) -> Any:
    """The value with tensors replaced by something that == can compare."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example as users do."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=100,
    )
