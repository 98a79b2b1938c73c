"""What debiasing needs of the rows: their energies, and sums weighted with them.

Bytes: the features once for the energies, once more for the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import column_mean, valid_rows


@triton.jit
def row_energies(
    x_ptr, stride_n, stride_d, mask_ptr, n, width, sums_ptr, segments, stride, count, scale,
    energy_ptr, begin, end, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Squared norms of the centered rows ``begin..end``; returns their sum and sum of squares."""
    total = tl.zeros([BLOCK_R], tl.float64)
    square = tl.zeros([BLOCK_R], tl.float64)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = valid_rows(mask_ptr, row, n, HAS_MASK) & (row < end)
        energy = tl.zeros([BLOCK_R], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            mean = column_mean(sums_ptr, column, segments, stride, count, column < width, BLOCK)
            mask = valid[:, None] & (column < width)[None, :]
            offsets = row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, (x - mean[None, :]) * scale, 0.0)
            energy += tl.sum(x * x, 1)
        tl.store(energy_ptr + row, energy, mask=row < end)
        wide = energy.to(tl.float64)
        total += wide
        square += wide * wide
    return tl.sum(total, 0), tl.sum(square, 0)


@triton.jit
def weighted_sums(
    x_ptr, stride_n, stride_d, mask_ptr, n, width, sums_ptr, segments, stride, count,
    own_ptr, other_ptr, out_ptr, half, begin, end,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Column sums of the centered rows ``begin..end``, weighted with either side's energies."""
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mean = column_mean(sums_ptr, column, segments, stride, count, column < width, BLOCK)
        by_own = tl.zeros([BLOCK], tl.float32)
        by_other = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            valid = valid_rows(mask_ptr, row, n, HAS_MASK) & (row < end)
            mask = valid[:, None] & (column < width)[None, :]
            offsets = row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - mean[None, :], 0.0)
            own = tl.load(own_ptr + row, mask=valid, other=0.0)
            other = tl.load(other_ptr + row, mask=valid, other=0.0)
            by_own += tl.sum(own[:, None] * x, 0)
            by_other += tl.sum(other[:, None] * x, 0)
        tl.store(out_ptr + column, by_own)
        tl.store(out_ptr + half + column, by_other)
