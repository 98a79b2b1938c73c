"""What a forward in covariance form saves for its backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .device import LONG_FIELDS, LONGEST, split
from .launch import padded_width
from .layers import Layers

# Fields of the scalars that the backward reads, for each side.
SCALE = tl.constexpr(0)
OWN = tl.constexpr(1)
OTHER = tl.constexpr(2)
FULL = tl.constexpr(3)
ROW = tl.constexpr(4)
ROW_OWN = tl.constexpr(5)
ROW_OTHER = tl.constexpr(6)
ROWS = tl.constexpr(7)
INVERSE_OWN = tl.constexpr(8)
INVERSE_OTHER = tl.constexpr(9)
SCALARS = 16


class Saved(NamedTuple):
    """What the backward in covariance form needs beside the features."""

    scalars: Tensor
    planes_x: Tensor
    planes_y: Tensor
    shift_x: Tensor
    shift_y: Tensor
    means: Tensor
    row_sums: Tensor
    products: Tensor
    weighted: Tensor
    longest: Tensor


def energy_programs(layers: Layers, debiased: bool) -> int:
    """Programs that sum rows' energies: few, because the backward adds up what each leaves."""
    if not debiased:
        return 0
    return 2 if layers.device.type == "cpu" else 32


def allocate(
    layers: Layers, config: Config, matrices: tuple[int, int], debiased: bool = False
) -> Saved:
    """Empty tensors; ``matrices`` is how many either side's gradient multiplies, 0 for none."""
    entries, width = layers.entries, padded_width(layers, config)
    student, teacher = matrices
    plane = entries * 2 * width * width
    shift = 0 if layers.exact else entries * 2 * (width // config.sub) * width
    return Saved(
        layers.empty(entries * 2 * SCALARS),
        layers.empty(plane * student, dtype=torch.bfloat16),
        layers.empty(plane * teacher, dtype=torch.bfloat16),
        layers.empty(shift if student else 0),
        layers.empty(shift if teacher else 0),
        layers.empty(entries * 2 * width),
        layers.empty(debiased * entries * 2 * layers.max_rows),
        # Written where rows are long; an operator's outputs repeat whole.
        layers.empty(debiased * entries * 2 * layers.max_rows * LONGEST.value).zero_(),
        layers.empty(entries * 4 * energy_programs(layers, debiased) * width),
        layers.empty(debiased * entries * LONG_FIELDS.value, dtype=torch.int32).zero_(),
    )


@triton.jit
def store_side(
    scalars_ptr, side, n, scale, own, other, full, row, row_own, row_other, inverse_own,
    inverse_other,
):  # fmt: skip
    """One side's scalars for the backward. The inverses stay apart from the rest, because their
    product may not be a float32."""
    field = tl.arange(0, 16)
    values = tl.where(field == SCALE, scale.to(tl.float32), 0.0)
    values = tl.where(field == OWN, own.to(tl.float32), values)
    values = tl.where(field == OTHER, other.to(tl.float32), values)
    values = tl.where(field == FULL, full.to(tl.float32), values)
    values = tl.where(field == ROW, row.to(tl.float32), values)
    values = tl.where(field == ROW_OWN, row_own.to(tl.float32), values)
    values = tl.where(field == ROW_OTHER, row_other.to(tl.float32), values)
    values = tl.where(field == ROWS, n.to(tl.float32), values)
    values = tl.where(field == INVERSE_OWN, inverse_own.to(tl.float32), values)
    values = tl.where(field == INVERSE_OTHER, inverse_other.to(tl.float32), values)
    tl.store(scalars_ptr + side * 16 + field, values)


@triton.jit
def store_halves(planes_ptr, plane, offsets, tile):
    """A float32 tile as two bfloat16 ones."""
    high, low = split(tile)
    tl.store(planes_ptr + offsets, high)
    tl.store(planes_ptr + plane + offsets, low)


@triton.jit
def store_shift(shift_ptr, half, offsets, mean, tile, AXIS: tl.constexpr):
    """What the mean of the left operand's columns makes of both halves of the right operand."""
    high, low = split(tile)
    factor = mean[None, :] if AXIS == 1 else mean[:, None]
    tl.store(shift_ptr + offsets, tl.sum(factor * high.to(tl.float32), AXIS))
    tl.store(shift_ptr + half + offsets, tl.sum(factor * low.to(tl.float32), AXIS))
