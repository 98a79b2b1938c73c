"""The layers of one launch as kernels take them: tuples of addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensor

# CUDA's limit of a grid's second axis.
MAX_ENTRIES = 65535
# In one launch. The kernels' parameters and the time to compile them grow with it: 4 KiB of the
# former are what every driver takes, and there are about 100 bytes a layer.
MAX_LAYERS = 24
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def numbers(values: Iterable[int]) -> tuple[int, ...]:
    """Sizes, strides or addresses in a form that is never 1 and never a multiple of 16.

    Triton would compile a kernel for every pattern of such numbers in a tuple, whatever it is told;
    ``device.size`` makes them what they were.
    """
    return tuple([2 * value + 3 for value in values])


class Side(NamedTuple):
    """Student or teacher: one tensor a layer; the last four as :func:`numbers`, () where idle."""

    tensors: tuple[Tensor, ...]
    widths: tuple[int, ...]
    stride_b: int
    # Elements that are loaded together: 16 bytes of aligned rows; 1 of rows that are contiguous,
    # and no more; 0 of others.
    vector: int
    addresses: tuple[int, ...]
    columns: tuple[int, ...]  # the widths
    strides_n: tuple[int, ...]
    strides_d: tuple[int, ...]


class Layers(NamedTuple):
    """The layers of one launch; ``entries`` is their number, or the size of the batch of one.

    Where a call has more, the tuples are filled up with the last one, so that its launches share
    their kernels; ``given`` is the number without those.
    """

    x: Side
    y: Side
    masks: tuple[Tensor, ...]
    stride_mb: int
    rows: tuple[int, ...]
    # Addresses and rows as :func:`numbers`.
    mask_numbers: tuple[int, ...]
    row_numbers: tuple[int, ...]
    max_rows: int
    given: int
    entries: int
    # Of the values: that of the batch of one layer, or (L,).
    shape_of_values: tuple[int, ...]
    device: torch.device
    # Features with more digits than bfloat16: split in two, and centered before they are.
    exact: bool
    # Without features (an empty batch) or with shapes only (torch.compile traces): no launch.
    idle: bool
    # Of both sides, the least and the most that a launch of the call has.
    vector: int
    widest: int

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
    def feature_options(self) -> dict[str, Any]:
        """Those of kernels that read features."""
        return {**self.options, "DTYPE": DTYPES[self.x.tensors[0].dtype], "VECTOR": self.vector}

    @property
    def shape(self) -> tuple[object, ...]:
        """What kernels of either side take first."""
        x, y = self.x, self.y
        return (
            x.addresses, y.addresses, self.mask_numbers, self.row_numbers, x.columns, y.columns,
            x.strides_n, x.strides_d, y.strides_n, y.strides_d,
            x.stride_b, y.stride_b, self.stride_mb,
        )  # fmt: skip

    def filled(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A tensor a layer, as many as the other tuples have."""
        return tensors + tensors[-1:] * (len(self.rows) - len(tensors))


def _side(tensors: Sequence[Tensor], dtype: torch.dtype, idle: bool) -> Side:
    # One axis for the batch: a copy only where the leading axes cannot be one.
    flat = tuple(tensors)
    if flat[0].dtype != dtype:
        flat = tuple(t.to(dtype) for t in flat)
    if flat[0].dim() > 3:
        flat = tuple(t.flatten(0, -3) for t in flat)
    stride_b = flat[0].stride(0) if flat[0].dim() == 3 else 0
    if idle:
        return Side(flat, tuple([t.shape[-1] for t in flat]), stride_b, 0, (), (), (), ())
    # Twice as much and 3 would be no int32, as which kernels take strides.
    flat = tuple([t.contiguous() if max(t.stride()) >= 2**29 else t for t in flat])
    stride_b = flat[0].stride(0) if flat[0].dim() == 3 else 0
    size = flat[0].element_size()
    vector = 16 // size
    # The last bits are 0 where they are of all.
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
        numbers(addresses),
        numbers(widths),
        numbers(strides_n),
        numbers(strides_d),
    )


def pack(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    slots: int | None = None,
) -> Layers:
    """The layers of a launch; where the dtypes of the sides differ, both as float32.

    ``slots``: how many of them the kernel has room for, as many as there are by default.
    """
    same = students[0].dtype == teachers[0].dtype
    dtype = students[0].dtype if same else torch.float32
    count = len(students)
    more = (slots or count) - count
    idle = isinstance(students[0], FakeTensor) or not students[0].numel()
    x, y = (_side([*side, *[side[-1]] * more], dtype, idle) for side in (students, teachers))
    valid = [mask.view(torch.uint8).reshape(-1, mask.shape[-1]).contiguous() for mask in masks]
    if len(valid) == 1:
        valid = valid * count
    entries = x.tensors[0].shape[0] if x.tensors[0].dim() == 3 else count
    if entries > MAX_ENTRIES:
        raise ValueError(
            f"the Triton kernels take batches of up to {MAX_ENTRIES}; got {entries} (the leading "
            "axes of student)"
        )
    rows = tuple([t.shape[-2] for t in x.tensors])
    valid += valid[-1:] * more
    return Layers(
        x=x,
        y=y,
        masks=tuple(valid),
        stride_mb=valid[0].stride(0) if valid else 0,
        rows=rows,
        mask_numbers=() if idle else numbers([mask.data_ptr() for mask in valid]),
        row_numbers=() if idle else numbers(rows),
        max_rows=max(rows),
        given=count,
        entries=entries,
        shape_of_values=students[0].shape[:-2] if len(rows) == 1 else (count,),
        device=students[0].device,
        exact=dtype != torch.bfloat16,
        idle=idle,
        vector=min(x.vector, y.vector),
        widest=max(*x.widths, *y.widths),
    )


def alike(launches: list[Layers]) -> list[Layers]:
    """With the same constants, so that nothing is compiled where other layers come together."""
    vector = min(layers.vector for layers in launches)
    widest = max(layers.widest for layers in launches)
    return [layers._replace(vector=vector, widest=widest) for layers in launches]
