"""Move a teacher to a device, unless something else places its parameters."""

from __future__ import annotations

import itertools

import torch
from torch import nn

_FSDP = ("FSDPModule", "FullyShardedDataParallel")


def move(teacher: nn.Module, device: torch.device | str) -> None:
    """Move a teacher to a device.

    One that Accelerate dispatched over devices, or that FSDP shards, stays: its hooks bring the
    inputs to its parameters. One that is there already is not touched, because a quantised model
    may refuse any move.

    Raises:
        ValueError: it cannot be moved, as some quantised models.
    """
    if any(_places_itself(module) for module in teacher.modules()):
        return
    device = torch.empty(0, device=device).device  # with its index: "cuda" is "cuda:0"
    tensors = itertools.chain(teacher.parameters(), teacher.buffers())
    places = {tensor.device for tensor in tensors}
    if places <= {device}:
        return
    try:
        teacher.to(device)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"teacher must be on {device}, the student's device, or be movable; got one on "
            f"{', '.join(sorted(map(str, places)))} whose .to({str(device)!r}) raises "
            f"{type(error).__name__}: load it there, with device_map={{'': "
            f"{str(device)!r}}}"
        ) from error


def _places_itself(module: nn.Module) -> bool:
    """Whether hooks of Accelerate or FSDP place this module's parameters and inputs."""
    kinds = {kind.__name__ for kind in type(module).__mro__}  # FSDP is not imported unasked
    return hasattr(module, "_hf_hook") or not kinds.isdisjoint(_FSDP)
