"""A tile's products over some chunks of its inner dimension."""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import column_mean
from .device import (
    CHUNKS,
    LONG_COUNT,
    among,
    kept_rows,
    load_features,
    long_rows,
    split,
    valid_rows,
)


@triton.jit
def _load_transposed(
    ptr, stride_n, stride_d, rows, valid, columns, width, mean=None, CENTER: tl.constexpr = False
):
    """load_features transposed; a transpose in registers would keep sm_80 from copying ahead."""
    mask = valid[None, :] & (columns < width)[:, None]
    offsets = rows.to(tl.int64)[None, :] * stride_n + columns.to(tl.int64)[:, None] * stride_d
    tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    if CENTER:
        tile = tl.where(mask, tile.to(tl.float32) - mean[:, None], 0.0)
    return tile


@triton.jit
def _product(a, b, acc, SPLIT: tl.constexpr):
    """``acc + a b``."""
    if SPLIT:
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def accumulate(
    acc, x_ptr, y_ptr, x_descriptor, y_descriptor, mask_ptr, n, d1, d2,
    stride_xn, stride_xd, stride_yn, stride_yd, longest_ptr, sums_ptr, segments, width, count,
    a_is_y, a_block, b_is_y, b_block, first, last,
    HAS_MASK: tl.constexpr, APART: tl.constexpr, GRAM: tl.constexpr, SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's products over the chunks ``first..last``, added to ``acc``."""
    local = tl.arange(0, BLOCK)
    a_side, b_side = a_block * BLOCK + local, b_block * BLOCK + local
    a_ptr, b_ptr = tl.where(a_is_y, y_ptr, x_ptr), tl.where(b_is_y, y_ptr, x_ptr)
    a_n, a_d = tl.where(a_is_y, stride_yn, stride_xn), tl.where(a_is_y, stride_yd, stride_xd)
    b_n, b_d = tl.where(b_is_y, stride_yn, stride_xn), tl.where(b_is_y, stride_yd, stride_xd)
    a_width, b_width = tl.where(a_is_y, d2, d1), tl.where(b_is_y, d2, d1)
    longest = longest_ptr
    if APART:
        longest = long_rows(longest_ptr)
    if DESCRIPTORS:
        if a_is_y:
            a_descriptor = y_descriptor
        else:
            a_descriptor = x_descriptor
        if b_is_y:
            b_descriptor = y_descriptor
        else:
            b_descriptor = x_descriptor
        chunks = longest_ptr
        if APART:
            chunks = long_rows(longest_ptr + CHUNKS)
        for chunk in range(first, last):
            if GRAM:
                a = a_descriptor.load([a_block * BLOCK, chunk * BLOCK_K])
                b = tl.trans(b_descriptor.load([b_block * BLOCK, chunk * BLOCK_K]))
            else:
                row = chunk * BLOCK_K
                if APART:
                    # The copy engine cannot mask a row, but reads zeros beyond the last one.
                    row = tl.where(among(chunk, chunks), n, row)
                a = tl.trans(a_descriptor.load([row, a_block * BLOCK]))
                b = b_descriptor.load([row, b_block * BLOCK])
            acc = _product(a, b, acc, SPLIT)
        if APART:
            for slot in range(tl.load(longest_ptr + LONG_COUNT)):
                chunk = tl.load(longest_ptr + CHUNKS + slot)
                if (chunk >= first) & (chunk < last):
                    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                    valid = kept_rows(mask_ptr, longest, k, n, False, True)
                    a = _load_transposed(a_ptr, a_n, a_d, k, valid, a_side, a_width)
                    b = load_features(b_ptr, b_n, b_d, k, valid, b_side, b_width)
                    acc = _product(a, b, acc, SPLIT)
    else:
        a_sums = sums_ptr + tl.where(a_is_y, segments * width, 0)
        b_sums = sums_ptr + tl.where(b_is_y, segments * width, 0)
        if GRAM:
            a_valid = valid_rows(mask_ptr, a_side, n, HAS_MASK)
            b_valid = valid_rows(mask_ptr, b_side, n, HAS_MASK)
            for chunk in range(first, last):
                k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                a_mean = tl.zeros([BLOCK_K], tl.float32)
                b_mean = a_mean
                if SPLIT:
                    # One segment, because a loop in here would keep loads from being pipelined.
                    a_mean = tl.load(a_sums + k, mask=k < width, other=0.0) / count
                    b_mean = tl.load(b_sums + k, mask=k < width, other=0.0) / count
                a = load_features(a_ptr, a_n, a_d, a_side, a_valid, k, a_width, a_mean, SPLIT)
                b = load_features(b_ptr, b_n, b_d, b_side, b_valid, k, b_width, b_mean, SPLIT)
                acc = _product(a, tl.trans(b), acc, SPLIT)
        else:
            a_mean = tl.zeros([BLOCK], tl.float32)
            b_mean = a_mean
            if SPLIT:
                a_mean = column_mean(a_sums, a_side, segments, width, count, a_side < width, BLOCK)
                b_mean = column_mean(b_sums, b_side, segments, width, count, b_side < width, BLOCK)
            for chunk in range(first, last):
                k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                valid = kept_rows(mask_ptr, longest, k, n, HAS_MASK, APART)
                a = _load_transposed(a_ptr, a_n, a_d, k, valid, a_side, a_width, a_mean, SPLIT)
                b = load_features(b_ptr, b_n, b_d, k, valid, b_side, b_width, b_mean, SPLIT)
                acc = _product(a, b, acc, SPLIT)
    return acc
