"""The layers of one launch as kernels take them: tuples of addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensor

# CUDA's limit on a grid's second axis.
MAX_ENTRIES = 65535
# Most layers of one launch. Compile time grows with it, and so do parameters: by about 100 bytes a
# layer, where every driver takes 4 KiB.
MAX_LAYERS = 24
# Kernels take strides as int32, and larger ones would not fit once encoded.
MAX_STRIDE = 2**29
Item = TypeVar("Item")
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def encoded(values: Iterable[int]) -> tuple[int, ...]:
    """Sizes, strides or addresses in a form that is never 1 and never a multiple of 16.

    Triton would compile a kernel for every pattern of such numbers in a tuple, whatever it is told.
    ``device.size`` decodes them.
    """
    return tuple([2 * value + 3 for value in values])


class Side(NamedTuple):
    """Student or teacher, one entry a layer; all numbers but the widths are :func:`encoded`.

    Nothing is encoded if nothing is launched.
    """

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    widths: tuple[int, ...]
    stride_b: int
    columns: tuple[int, ...] = ()  # the widths
    strides_n: tuple[int, ...] = ()
    strides_d: tuple[int, ...] = ()


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
    # Elements that one load takes: 16 bytes if rows are aligned, 1 if they are merely contiguous,
    # else 0; and the largest width. Both of both sides, over all launches of the call.
    vector: int
    widest: int

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory on the device."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def zeros(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that is set to 0."""
        return torch.zeros(size, dtype=dtype, device=self.device)

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

    def padded(self, items: tuple[Item, ...]) -> tuple[Item, ...]:
        """One item a layer, the last one repeated up to the length of the other tuples."""
        return items + items[-1:] * (len(self.rows) - len(items))


class _Layout(NamedTuple):
    """What follows from sizes and strides: fields of Side, from the widths on, and of Layers."""

    x: tuple[Any, ...]
    y: tuple[Any, ...]
    rows: tuple[int, ...]
    row_counts: tuple[int, ...]
    max_rows: int
    vector: int  # if all addresses are aligned
    widest: int
    max_stride: int


# The shape and the strides of each tensor.
_Sizes = tuple[tuple[torch.Size, tuple[int, ...]], ...]


# A training repeats its shapes.
@lru_cache(maxsize=256)
def _layout(sizes_x: _Sizes, sizes_y: _Sizes, itemsize: int) -> _Layout:
    rows = tuple([shape[-2] for shape, _ in sizes_x])
    vector, sides = 16 // itemsize, []
    for sizes in (sizes_x, sizes_y):
        widths = tuple([shape[-1] for shape, _ in sizes])
        strides_n, strides_d = ([strides[axis] for _, strides in sizes] for axis in (-2, -1))
        stride_b = sizes[0][1][0] if len(sizes[0][0]) == 3 else 0
        # Low bits stay 0 if they are 0 everywhere.
        bits = stride_b
        for number in (*widths, *strides_n):
            bits |= number
        if bits * itemsize % 16:
            vector = min(vector, 1)
        if any(step != 1 and width > 1 for step, width in zip(strides_d, widths, strict=True)):
            vector = 0
        sides.append((widths, stride_b, encoded(widths), encoded(strides_n), encoded(strides_d)))
    x, y = sides
    max_stride = max([max(strides) for _, strides in sizes_x + sizes_y])
    return _Layout(x, y, rows, encoded(rows), max(rows), vector, max(*x[0], *y[0]), max_stride)


def _idle_layout(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> _Layout:
    """Sizes alone, which may be symbols."""
    widths_x, widths_y = (tuple([t.shape[-1] for t in side]) for side in (xs, ys))
    rows = tuple([t.shape[-2] for t in xs])
    widest = max(*widths_x, *widths_y)
    return _Layout((widths_x, 0), (widths_y, 0), rows, (), max(rows), 0, widest, 0)


def _matrices(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Leading axes become one batch axis, with a copy only if strides do not allow a view."""
    if tensors[0].dtype != dtype:
        tensors = [t.to(dtype) for t in tensors]
    if tensors[0].dim() > 3:
        tensors = [t.flatten(0, -3) for t in tensors]
    return list(tensors)


def _sizes(tensors: Sequence[Tensor]) -> _Sizes:
    return tuple([(t.shape, t.stride()) for t in tensors])


def _with_short_strides(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() if max(t.stride()) >= MAX_STRIDE else t for t in tensors]


def pack(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    slots: int | None = None,
) -> Layers:
    """The layers of a launch, as float32 if the dtypes of the sides differ.

    ``slots``: how many layers the kernel has room for, by default as many as there are.
    """
    first = students[0]
    dtype = first.dtype if first.dtype == teachers[0].dtype else torch.float32
    count = len(students)
    idle = isinstance(first, FakeTensor) or not first.numel()
    xs, ys = _matrices(students, dtype), _matrices(teachers, dtype)
    flat = [mask.contiguous() for mask in masks]
    if len(flat) == 1:
        flat = flat * count
    if slots is not None and slots > count:
        for tensors in (xs, ys, flat):
            tensors += tensors[-1:] * (slots - count)
    entries = xs[0].shape[0] if xs[0].dim() == 3 else count
    if entries > MAX_ENTRIES:
        raise ValueError(
            f"the Triton kernels take batches of up to {MAX_ENTRIES}; got {entries} (the leading "
            "axes of student)"
        )
    if idle:
        layout, addresses_x, addresses_y, addresses_m = _idle_layout(xs, ys), [], [], []
    else:
        layout = _layout(_sizes(xs), _sizes(ys), xs[0].element_size())
        if layout.max_stride >= MAX_STRIDE:
            xs, ys = _with_short_strides(xs), _with_short_strides(ys)
            layout = _layout(_sizes(xs), _sizes(ys), xs[0].element_size())
        addresses_x, addresses_y = [t.data_ptr() for t in xs], [t.data_ptr() for t in ys]
        addresses_m = [t.data_ptr() for t in flat]
    bits = 0
    for address in addresses_x + addresses_y:
        bits |= address
    return Layers(
        x=Side(tuple(xs), encoded(addresses_x), *layout.x),
        y=Side(tuple(ys), encoded(addresses_y), *layout.y),
        masks=tuple(flat),
        stride_mb=flat[0].shape[-1] if flat else 0,
        rows=layout.rows,
        mask_addresses=encoded(addresses_m),
        row_counts=layout.row_counts,
        max_rows=layout.max_rows,
        layer_count=count,
        entries=entries,
        value_shape=first.shape[:-2] if len(xs) == 1 else (count,),
        device=first.device,
        is_split=dtype != torch.bfloat16,
        idle=idle,
        vector=min(layout.vector, 1) if bits % 16 else layout.vector,
        widest=layout.widest,
    )


def unified(launches: list[Layers]) -> list[Layers]:
    """Launches with the same constants, so that other groups of layers compile nothing new."""
    vector = min(layers.vector for layers in launches)
    widest = max(layers.widest for layers in launches)
    return [layers._replace(vector=vector, widest=widest) for layers in launches]
