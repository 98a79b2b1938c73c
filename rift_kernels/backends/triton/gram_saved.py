"""What a forward in Gram form saves for its backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import round_up
from .layers import Layers

# Fields of the scalars that the backward reads, for each side; see gram_backward.py.
OWN = tl.constexpr(0)  # c
OTHER = tl.constexpr(1)  # c'
ROWS = tl.constexpr(2)
INVERSE = tl.constexpr(3)  # the scale that brings features to unit norm
SCALARS = tl.constexpr(8)


class Saved(NamedTuple):
    """What the backward in Gram form needs besides the features."""

    grams: Tensor  # one allocation for the scalars of all entries, then both matrices of each
    means: Tensor  # of columns, if rows do not fit into one block


def stride_of(layers: Layers) -> int:
    """The stride between rows of a stored matrix; see :func:`edge_of`."""
    return round_up(layers.max_rows, 16)


def allocate(layers: Layers, means: int, store: bool) -> Saved:
    """Uninitialised tensors; ``means``: columns of either side, ``store``: there is a backward."""
    matrices = store * 2 * stride_of(layers) ** 2
    return Saved(
        layers.empty(layers.entries * (SCALARS.value + matrices)),
        layers.empty(store * layers.entries * 2 * means),
    )


@triton.jit
def store_side(scalars_ptr, n, own, other, inverse):
    """Store one side's scalars. The inverse stays separate, because its square may leave the range
    of float32."""
    field = tl.arange(0, 4)
    values = tl.where(field == OWN, own.to(tl.float32), 0.0)
    values = tl.where(field == OTHER, other.to(tl.float32), values)
    values = tl.where(field == ROWS, n.to(tl.float32), values)
    tl.store(scalars_ptr + field, tl.where(field == INVERSE, inverse, values))


@triton.jit
def grams_of(saved_ptr, entry, plane):
    """Pointer to both matrices of an entry, behind the scalars of all entries."""
    return saved_ptr + tl.num_programs(1) * SCALARS + entry * 2 * plane


@triton.jit
def edge_of(n):
    """Rows and columns that are stored: n, with zeros up to a multiple of 16 for whole vectors."""
    return tl.cdiv(n, 16) * 16
