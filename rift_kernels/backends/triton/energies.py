"""What debiasing needs of the rows: their energies, their products with the long ones, and sums
weighted with what these make.

Bytes: the features once for the energies, once more for the sums, and where rows are long once
more for the products, 32 a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import LONGEST, column_mean, kept_rows, valid_rows


@triton.jit
def row_energies(
    x_ptr, stride_n, stride_d, mask_ptr, longest, n, width,
    sums_ptr, segments, stride, count, scale, energy_ptr, begin, end,
    HAS_MASK: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Squared norms of the centered rows ``begin..end``, 0 of rows that are kept apart; returns
    their sum and sum of squares."""
    total = tl.zeros([BLOCK_R], tl.float64)
    square = tl.zeros([BLOCK_R], tl.float64)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = kept_rows(mask_ptr, longest, row, n, HAS_MASK, APART) & (row < end)
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
def long_products(
    x_ptr, stride_n, stride_d, mask_ptr, longest_ptr, long_count, n, width,
    sums_ptr, segments, stride, count, scale, out_ptr, begin, end,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Products of the centered rows ``begin..end`` with the long ones."""
    slots = tl.arange(0, LONGEST)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = valid_rows(mask_ptr, row, n, HAS_MASK) & (row < end)
        products = tl.zeros([BLOCK_R, LONGEST], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            mean = column_mean(sums_ptr, column, segments, stride, count, inside, BLOCK)
            mask = valid[:, None] & inside[None, :]
            columns = column.to(tl.int64) * stride_d
            offsets = row.to(tl.int64)[:, None] * stride_n + columns[None, :]
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, (x - mean[None, :]) * scale, 0.0)
            for slot in range(long_count):
                other = tl.load(longest_ptr + slot).to(tl.int64) * stride_n
                p = tl.load(x_ptr + other + columns, mask=inside, other=0.0).to(tl.float32)
                p = tl.where(inside, (p - mean) * scale, 0.0)
                product = tl.sum(x * p[None, :], 1)
                products += tl.where(slots[None, :] == slot, product[:, None], 0.0)
        out = out_ptr + row.to(tl.int64)[:, None] * LONGEST + slots[None, :]
        tl.store(out, products, mask=(row < end)[:, None] & (slots < long_count)[None, :])


@triton.jit
def weighted_sums(
    x_ptr, stride_n, stride_d, mask_ptr, longest, n, width, sums_ptr, segments, stride, count,
    own_ptr, other_ptr, out_ptr, half, begin, end,
    HAS_MASK: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Column sums of the centered rows ``begin..end``, weighted with a number of either side's."""
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mean = column_mean(sums_ptr, column, segments, stride, count, column < width, BLOCK)
        by_own = tl.zeros([BLOCK], tl.float32)
        by_other = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            valid = kept_rows(mask_ptr, longest, row, n, HAS_MASK, APART) & (row < end)
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
