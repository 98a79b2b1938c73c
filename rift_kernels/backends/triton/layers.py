"""The layers of one call as kernels take them: tuples of pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# CUDA's limit of a grid's second axis.
MAX_ENTRIES = 65535


class Side(NamedTuple):
    """Student or teacher: one tensor a layer, its width and its strides."""

    tensors: tuple[Tensor, ...]
    widths: tuple[int, ...]
    strides_n: tuple[int, ...]
    strides_d: tuple[int, ...]
    stride_b: int


class Layers(NamedTuple):
    """All layers of a call; ``entries`` is their number, or the size of the batch of one."""

    x: Side
    y: Side
    masks: tuple[Tensor, ...]
    stride_mb: int
    rows: tuple[int, ...]
    max_rows: int
    entries: int
    # Of the values: that of the batch of one layer, or (L,).
    shape_of_values: tuple[int, ...]
    device: torch.device
    # Features with more digits than bfloat16: split in two, and centered before they are.
    exact: bool
    # Without features (an empty batch) or with shapes only (torch.compile traces): no launch.
    idle: bool

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory on the device."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def values(self) -> Tensor:
        """Memory for a value each, in the shape that they are returned in."""
        return self.empty(*self.shape_of_values)

    @property
    def options(self) -> dict[str, Any]:
        """The constants that every kernel over layers takes."""
        return {"LAYERS": len(self.rows), "HAS_MASK": bool(self.masks)}

    @property
    def shape(self) -> tuple[object, ...]:
        """What kernels of either side take first."""
        x, y = self.x, self.y
        return (
            x.tensors, y.tensors, self.masks, self.rows, x.widths, y.widths,
            x.strides_n, x.strides_d, y.strides_n, y.strides_d,
            x.stride_b, y.stride_b, self.stride_mb,
        )  # fmt: skip


def _side(tensors: Sequence[Tensor], dtype: torch.dtype) -> Side:
    # One axis for the batch: a copy only where the leading axes cannot be one.
    flat = tuple(tensors)
    if flat[0].dtype != dtype:
        flat = tuple(t.to(dtype) for t in flat)
    if flat[0].dim() > 3:
        flat = tuple(t.flatten(0, -3) for t in flat)
    return Side(
        flat,
        tuple(t.shape[-1] for t in flat),
        tuple(t.stride(-2) for t in flat),
        tuple(t.stride(-1) for t in flat),
        flat[0].stride(0) if flat[0].dim() == 3 else 0,
    )


def pack(students: Sequence[Tensor], teachers: Sequence[Tensor], masks: Sequence[Tensor]) -> Layers:
    """The layers of a call; where the dtypes of the sides differ, both as float32."""
    same = students[0].dtype == teachers[0].dtype
    dtype = students[0].dtype if same else torch.float32
    x, y = _side(students, dtype), _side(teachers, dtype)
    layers = len(students)
    valid = [mask.view(torch.uint8).reshape(-1, mask.shape[-1]).contiguous() for mask in masks]
    if len(valid) == 1:
        valid = valid * layers
    entries = x.tensors[0].shape[0] if x.tensors[0].dim() == 3 else layers
    if entries > MAX_ENTRIES:
        raise ValueError(
            f"the Triton kernels take batches of up to {MAX_ENTRIES}; got {entries} (the leading "
            "axes of student)"
        )
    rows = tuple(t.shape[-2] for t in x.tensors)
    return Layers(
        x=x,
        y=y,
        masks=tuple(valid),
        stride_mb=valid[0].stride(0) if valid else 0,
        rows=rows,
        max_rows=max(rows),
        entries=entries,
        shape_of_values=students[0].shape[:-2] if layers == 1 else (layers,),
        device=students[0].device,
        exact=dtype != torch.bfloat16,
        idle=isinstance(students[0], FakeTensor) or not students[0].numel(),
    )
