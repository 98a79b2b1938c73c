"""Checkpoints of the finetuning examples, with everything that an exact continuation needs."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .processes import UserError

_NAME = re.compile(r"step-(\d+)\.pt")


@dataclass
class Progress:
    """The position of a run and its metrics, as plain values."""

    epoch: int = 0
    batch: int = 0  # finished passes of this epoch
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stale: int = 0  # epochs since the best
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the last step."""
    paths = _all(folder)
    return paths[-1] if paths else None


def save(state: dict[str, Any], folder: Path, step: int, keep: int) -> None:
    """Write a checkpoint atomically, and delete all but the newest ``keep``."""
    write(folder / f"step-{step:09d}.pt", lambda path: torch.save(state, path))
    for old in _all(folder)[:-keep]:
        old.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU.

    Raises:
        UserError: it is unreadable.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise errors of any type
        raise UserError(
            f"cannot read the checkpoint {path}: {error}. Delete it to resume from an earlier one"
        ) from error
    return state


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Write a file or a folder under a temporary name, so that ``path`` is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    old = path.with_name(f".{path.name}.old")
    for leftover in (part, old):
        _remove(leftover)
    writer(part)
    if part.is_dir() and path.exists():  # a folder cannot replace another
        path.rename(old)
    elif part.is_file():
        with part.open("rb") as file:
            os.fsync(file.fileno())
    part.replace(path)
    _remove(old)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: trained parameters and buffers; few with LoRA."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the result of :func:`weights`.

    Raises:
        UserError: it is from another model.
    """
    differences = sorted(set(weights(model)) ^ set(state))
    if differences:
        raise UserError(
            f"the checkpoint is from another model: only one of them has {differences[0]!r}; "
            f"{len(differences)} tensors differ in all"
        )
    model.load_state_dict(state, strict=False)


def random_state() -> dict[str, Any]:
    """The state of every generator that a model may use."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the result of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _all(folder: Path) -> list[Path]:
    """The checkpoints in order of their steps, without partial files."""
    steps = [(int(m[1]), p) for p in folder.glob("step-*.pt") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(steps)]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
