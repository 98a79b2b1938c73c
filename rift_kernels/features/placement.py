"""Where a teacher's parameters are: moved to a device, or placed by somebody else's hooks."""

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
    if is_placed_by_hooks(teacher):
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


def is_placed_by_hooks(model: nn.Module) -> bool:
    """Whether hooks of Accelerate, DeepSpeed or FSDP move parameters before and after calls."""
    return any(_has_hooks(module) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def _has_hooks(module: nn.Module) -> bool:
    kinds = {kind.__name__ for kind in type(module).__mro__}  # FSDP is not imported unasked
    return hasattr(module, "_hf_hook") or not kinds.isdisjoint(_FSDP)
