"""The layers of one launch as kernels take them: tuples of addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensor

# CUDA's limit on a grid's second axis.
MAX_ENTRIES = 65535
# Most layers of one launch. Compile time grows with it, and so do parameters: by about 100 bytes a
# layer, where every driver takes 4 KiB.
MAX_LAYERS = 24
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def encoded(values: Iterable[int]) -> tuple[int, ...]:
    """Sizes, strides or addresses in a form that is never 1 and never a multiple of 16.

    Triton would compile a kernel for every pattern of such numbers in a tuple, whatever it is told.
    ``device.size`` decodes them.
    """
    return tuple([2 * value + 3 for value in values])


class Side(NamedTuple):
    """Student or teacher, one tensor a layer; the last four are :func:`encoded`, or () if idle."""

    tensors: tuple[Tensor, ...]
    widths: tuple[int, ...]
    stride_b: int
    # Elements that one load takes: 16 bytes if rows are aligned, 1 if they are merely contiguous,
    # else 0.
    vector: int
    addresses: tuple[int, ...]
    columns: tuple[int, ...]  # the widths
    strides_n: tuple[int, ...]
    strides_d: tuple[int, ...]


class Layers(NamedTuple):
    """The layers of one launch; ``entries`` is their number, or the size of the batch of one.

    If a call needs several launches, their tuples repeat the last layer up to a common length, so
    that they share compiled kernels. ``layer_count`` does not count these repetitions.
    """

    x: Side
    y: Side
    masks: tuple[Tensor, ...]
    stride_mb: int
    rows: tuple[int, ...]
    # Both :func:`encoded`.
    mask_addresses: tuple[int, ...]
    row_counts: tuple[int, ...]
    max_rows: int
    layer_count: int
    entries: int
    # The batch of a single layer, or (L,).
    value_shape: tuple[int, ...]
    device: torch.device
    # Whether features have more digits than bfloat16, so that they are centered and split in two.
    is_split: bool
    # Whether nothing is launched: the batch is empty, or torch.compile traces with shapes alone.
    idle: bool
    # The smallest vector and the largest width of both sides, over all launches of the call.
    vector: int
    widest: int

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory on the device."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def values(self) -> Tensor:
        """Uninitialised values, in the shape that the call returns."""
        return self.empty(*self.value_shape)

    @property
    def options(self) -> dict[str, Any]:
        """Constants of every kernel over layers."""
        return {"LAYERS": len(self.rows), "HAS_MASK": bool(self.masks)}

    @property
    def feature_options(self) -> dict[str, Any]:
        """Constants of kernels that read features."""
        return {**self.options, "DTYPE": DTYPES[self.x.tensors[0].dtype], "VECTOR": self.vector}

    @property
    def arguments(self) -> tuple[object, ...]:
        """First arguments of kernels that read both sides."""
        x, y = self.x, self.y
        return (
            x.addresses, y.addresses, self.mask_addresses, self.row_counts, x.columns, y.columns,
            x.strides_n, x.strides_d, y.strides_n, y.strides_d,
            x.stride_b, y.stride_b, self.stride_mb,
        )  # fmt: skip

    def padded(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One tensor a layer, repeated up to the length of the other tuples."""
        return tensors + tensors[-1:] * (len(self.rows) - len(tensors))


def _side(tensors: Sequence[Tensor], dtype: torch.dtype, idle: bool) -> Side:
    # Leading axes become one batch axis, with a copy only if strides do not allow a view.
    flat = tuple(tensors)
    if flat[0].dtype != dtype:
        flat = tuple(t.to(dtype) for t in flat)
    if flat[0].dim() > 3:
        flat = tuple(t.flatten(0, -3) for t in flat)
    stride_b = flat[0].stride(0) if flat[0].dim() == 3 else 0
    if idle:
        return Side(flat, tuple([t.shape[-1] for t in flat]), stride_b, 0, (), (), (), ())
    # Kernels take strides as int32, and larger ones would not fit once encoded.
    flat = tuple([t.contiguous() if max(t.stride()) >= 2**29 else t for t in flat])
    stride_b = flat[0].stride(0) if flat[0].dim() == 3 else 0
    size = flat[0].element_size()
    vector = 16 // size
    # Low bits stay 0 if they are 0 everywhere.
    bits = stride_b * size
    sizes = []
    for t in flat:
        width, strides, address = t.shape[-1], t.stride(), t.data_ptr()
        bits |= address | (width | strides[-2]) * size
        if strides[-1] != 1 and width > 1:
            vector = 0
        sizes.append((width, address, strides[-2], strides[-1]))
    if bits % 16:
        vector = min(vector, 1)
    widths, addresses, strides_n, strides_d = zip(*sizes, strict=True)
    return Side(
        flat,
        widths,
        stride_b,
        vector,
        encoded(addresses),
        encoded(widths),
        encoded(strides_n),
        encoded(strides_d),
    )


def pack(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    slots: int | None = None,
) -> Layers:
    """The layers of a launch, as float32 if the dtypes of the sides differ.

    ``slots``: how many layers the kernel has room for, by default as many as there are.
    """
    same = students[0].dtype == teachers[0].dtype
    dtype = students[0].dtype if same else torch.float32
    count = len(students)
    missing = (slots or count) - count
    idle = isinstance(students[0], FakeTensor) or not students[0].numel()
    x, y = (_side([*side, *[side[-1]] * missing], dtype, idle) for side in (students, teachers))
    flat = [mask.view(torch.uint8).reshape(-1, mask.shape[-1]).contiguous() for mask in masks]
    if len(flat) == 1:
        flat = flat * count
    entries = x.tensors[0].shape[0] if x.tensors[0].dim() == 3 else count
    if entries > MAX_ENTRIES:
        raise ValueError(
            f"the Triton kernels take batches of up to {MAX_ENTRIES}; got {entries} (the leading "
            "axes of student)"
        )
    rows = tuple([t.shape[-2] for t in x.tensors])
    flat += flat[-1:] * missing
    return Layers(
        x=x,
        y=y,
        masks=tuple(flat),
        stride_mb=flat[0].stride(0) if flat else 0,
        rows=rows,
        mask_addresses=() if idle else encoded([mask.data_ptr() for mask in flat]),
        row_counts=() if idle else encoded(rows),
        max_rows=max(rows),
        layer_count=count,
        entries=entries,
        value_shape=students[0].shape[:-2] if len(rows) == 1 else (count,),
        device=students[0].device,
        is_split=dtype != torch.bfloat16,
        idle=idle,
        vector=min(x.vector, y.vector),
        widest=max(*x.widths, *y.widths),
    )


def unified(launches: list[Layers]) -> list[Layers]:
    """Launches with the same constants, so that other groups of layers compile nothing new."""
    vector = min(layers.vector for layers in launches)
    widest = max(layers.widest for layers in launches)
    return [layers._replace(vector=vector, widest=widest) for layers in launches]
