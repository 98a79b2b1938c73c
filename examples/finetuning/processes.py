"""The processes that train together, and how errors are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class UserError(ValueError):
    """Something that whoever started the training can put right, told without a traceback."""


@contextmanager
def explained(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with the message of such an error, and of a UserError."""
    told: tuple[type[Exception], ...] = (UserError, *kinds)
    try:
        yield
    except told as error:
        lines = str(error).strip().split("\n")
        # From a process that loads data comes its traceback as well.
        line = lines[-1].partition("Error: ")[2] if lines[0].startswith("Caught ") else str(error)
        raise SystemExit(f"error: {line}") from error


class World(NamedTuple):
    """One process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def total(self, values: Tensor) -> list[float]:
        """The sum over all processes."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        found: list[float] = values.tolist()
        return found

    def gathered(self, value: Any) -> list[Any]:
        """What every process has."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        return DistributedDataParallel(model) if self.size > 1 else model


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """One process alone, or with those that torchrun started.

    Raises:
        UserError: there is no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    together = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if name == "cuda" and together:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        chosen = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        line = str(error).split("\n")[0]
        raise UserError(f"--device must be one that torch can use; got {name!r}: {line}") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not together:
        yield World(chosen)
        return
    # With gloo beside, the regulariser's small messages do not make the GPU wait.
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    yield World(chosen, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: others may still wait for this process
