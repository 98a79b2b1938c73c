"""Processes that train together, and errors reported without a traceback."""

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
    """An error that the user can correct, reported without a traceback."""


@contextmanager
def report_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with only the message of a UserError, or of an error of these kinds."""
    reported: tuple[type[Exception], ...] = (UserError, *kinds)
    try:
        yield
    except reported as error:
        message = str(error)
        lines = message.strip().split("\n")
        if lines[0].startswith("Caught "):  # a data-loading process adds its traceback
            message = lines[-1].partition("Error: ")[2]
        raise SystemExit(f"error: {message}") from error


class World(NamedTuple):
    """The current process among those that train together."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def total(self, values: Tensor) -> list[float]:
        """The sums over all processes."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        totals: list[float] = values.tolist()
        return totals

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        return DistributedDataParallel(model) if self.size > 1 else model


@contextmanager
def join_world(device_name: str | None) -> Iterator[World]:
    """Join the processes that torchrun started, if any.

    Raises:
        UserError: there is no such device.
    """
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    has_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if name == "cuda" and has_torchrun:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        line = str(error).split("\n")[0]
        raise UserError(f"--device must be one that torch can use; got {name!r}: {line}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not has_torchrun:
        yield World(device)
        return
    # gloo beside NCCL lets the regulariser exchange small messages without waiting for the GPU.
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield World(device, dist.get_rank(), dist.get_world_size())
    # Skipped after an error, when other processes may still wait for this one.
    dist.destroy_process_group()
