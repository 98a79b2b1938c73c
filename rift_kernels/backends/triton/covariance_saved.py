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

# Fields of the scalars that the backward reads, for each side; see covariance_backward.py.
SCALE = tl.constexpr(0)
OWN = tl.constexpr(1)  # c
OTHER = tl.constexpr(2)  # c'
LOW_HALVES = tl.constexpr(3)  # whether low halves are multiplied as well
# w = ROW + ROW_OWN * own + ROW_OTHER * other, by row_sums. ROW alone is the distance's bias.
ROW = tl.constexpr(4)
ROW_OWN = tl.constexpr(5)
ROW_OTHER = tl.constexpr(6)
ROWS = tl.constexpr(7)
INVERSE_OWN = tl.constexpr(8)  # scales that bring features to unit norm
INVERSE_OTHER = tl.constexpr(9)
SCALARS = tl.constexpr(16)


class Saved(NamedTuple):
    """What the backward in covariance form needs besides the features.

    Only debiased CKA has the last four.
    """

    scalars: Tensor
    planes_x: Tensor  # P above R for the student's gradient: high halves, then low halves
    planes_y: Tensor
    shift_x: Tensor  # products of column means with planes_x, in parts
    shift_y: Tensor
    means: Tensor  # of columns
    row_sums: Tensor  # of K and L without the diagonal, negative
    products: Tensor  # of all rows with the long ones
    weighted: Tensor  # column sums weighted with either side's row sums, one a group of programs
    longest: Tensor  # records of longest.py


def energy_programs(layers: Layers, debiased: bool) -> int:
    """Groups of programs that sum energies of rows: few, because the backward adds up what each
    leaves. See row_terms.py."""
    if not debiased:
        return 0
    return 2 if layers.device.type == "cpu" else 32


def allocate(
    layers: Layers, config: Config, matrices: tuple[int, int], debiased: bool = False
) -> Saved:
    """Uninitialised tensors; ``matrices``: how many either gradient multiplies, 0 if unwanted."""
    entries, width = layers.entries, padded_width(layers, config)
    student, teacher = matrices
    plane = entries * 2 * width * width
    shift = 0 if layers.is_split else entries * 2 * (width // config.sub) * width
    return Saved(
        layers.empty(entries * 2 * SCALARS.value),
        layers.empty(plane * student, dtype=torch.bfloat16),
        layers.empty(plane * teacher, dtype=torch.bfloat16),
        layers.empty(shift if student else 0),
        layers.empty(shift if teacher else 0),
        layers.empty(entries * 2 * width),
        layers.empty(debiased * entries * 2 * layers.max_rows),
        # Kernels write only where rows are long, but all of an operator's output must repeat.
        layers.zeros(debiased * entries * 2 * layers.max_rows * LONGEST.value),
        layers.empty(entries * 4 * energy_programs(layers, debiased) * width),
        layers.zeros(debiased * entries * LONG_FIELDS.value, dtype=torch.int32),
    )


@triton.jit
def store_side(
    scalars_ptr, side, n, scale, own, other, low_halves, row, row_own, row_other, inverse_own,
    inverse_other,
):  # fmt: skip
    """Store one side's scalars. The inverses stay separate, because their product may leave the
    range of float32."""
    field = tl.arange(0, SCALARS)
    values = tl.where(field == SCALE, scale.to(tl.float32), 0.0)
    values = tl.where(field == OWN, own.to(tl.float32), values)
    values = tl.where(field == OTHER, other.to(tl.float32), values)
    values = tl.where(field == LOW_HALVES, low_halves.to(tl.float32), values)
    values = tl.where(field == ROW, row.to(tl.float32), values)
    values = tl.where(field == ROW_OWN, row_own.to(tl.float32), values)
    values = tl.where(field == ROW_OTHER, row_other.to(tl.float32), values)
    values = tl.where(field == ROWS, n.to(tl.float32), values)
    values = tl.where(field == INVERSE_OWN, inverse_own.to(tl.float32), values)
    values = tl.where(field == INVERSE_OTHER, inverse_other.to(tl.float32), values)
    tl.store(scalars_ptr + side * SCALARS + field, values)


@triton.jit
def store_halves(planes_ptr, plane, offsets, tile):
    """Store a float32 tile as two bfloat16 tiles."""
    high, low = split(tile)
    tl.store(planes_ptr + offsets, high)
    tl.store(planes_ptr + plane + offsets, low)


@triton.jit
def store_shift(shift_ptr, half, offsets, mean, tile, AXIS: tl.constexpr):
    """Store products of the left operand's column means with both halves of the right operand."""
    high, low = split(tile)
    factor = mean[None, :] if AXIS == 1 else mean[:, None]
    tl.store(shift_ptr + offsets, tl.sum(factor * high.to(tl.float32), AXIS))
    tl.store(shift_ptr + half + offsets, tl.sum(factor * low.to(tl.float32), AXIS))
