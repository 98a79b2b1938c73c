"""Gradients in Gram form: ``grad_X = g M Xc``.

    M = c Kx + c' Ky,    c = -2 value / ||Kx||^2,    c' = 2 / (||Kx|| ||Ky||)

M is formed in float32, tile by tile, and multiplied in two halves. Its rows sum to 0, except for
rounding in sums of K before it was centered. Times the mean of features far from 0, that is as
large as the gradient, so it is subtracted at the end. Few rows need no such step, because their K
is made of centered features. Features wider than bfloat16 are centered before they are split.

Bytes: both K once per block of columns, X once per block of rows, the gradient once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .device import (
    batch_of,
    features_of,
    layer_of,
    mask_of,
    multiple,
    pick,
    size,
    split,
    valid_rows,
)
from .gram_cka_small import SMALL_GRAM_ROWS, rows_of
from .gram_saved import INVERSE, OTHER, OWN, SCALARS, Saved, edge_of, grams_of, stride_of
from .launch import gradients
from .layers import Layers


@triton.jit(
    do_not_specialize=[
        *("stride_b", "stride_mb", "stride_gb", "incoming_ptr", "max_width"),
    ]
)
def gram_backward_kernel(
    owns, masks, grads, rows, widths, strides_n, strides_d, stride_b, stride_mb, stride_gb,
    incoming_ptr, saved_ptr, means_ptr, width, stride, max_width,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    SIDE: tl.constexpr,
    SMALL: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of ``grad = g M X``."""
    entry = tl.program_id(1)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n, d = size(rows, layer), size(widths, layer, VECTOR)
    blocks_n = tl.cdiv(max_width, BLOCK_N)
    block_m, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    if (block_m * BLOCK_M < n) & (block_n * BLOCK_N < d):
        x_ptr, stride_n, stride_d = features_of(
            owns, strides_n, strides_d, stride_b, layer, batch, DTYPE, VECTOR
        )
        grad_ptr = pick(grads, layer) + batch * multiple(stride_gb, VECTOR)
        mask_ptr = mask_of(masks, stride_mb, layer, batch, x_ptr, HAS_MASK)
        scalars_ptr = saved_ptr + entry * SCALARS + SIDE * 4
        incoming = tl.load(incoming_ptr + entry).to(tl.float32)
        c_own = tl.load(scalars_ptr + OWN)
        c_other = tl.load(scalars_ptr + OTHER)
        plane = stride.to(tl.int64) * stride
        edge = edge_of(n)
        grams_ptr = grams_of(saved_ptr, entry, plane)
        own_ptr = grams_ptr + SIDE * plane
        other_ptr = grams_ptr + (1 - SIDE) * plane
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mean = tl.zeros([BLOCK_N], tl.float32)
        if not SMALL:
            means_ptr += (entry * 2 + SIDE) * width
            mean = tl.load(means_ptr + column, mask=column < d, other=0.0)
        row_sums = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, n, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            offsets = row.to(tl.int64)[:, None] * stride + k[None, :]
            inside = (row < edge)[:, None] & (k < edge)[None, :]
            own = tl.load(own_ptr + offsets, mask=inside, other=0.0)
            other = tl.load(other_ptr + offsets, mask=inside, other=0.0)
            m = c_own * own + c_other * other
            high, low = split(m)
            valid = valid_rows(mask_ptr, k, n, HAS_MASK)
            mask = valid[:, None] & (column < d)[None, :]
            offsets = k.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
            if SPLIT:
                x = x.to(tl.float32)
                if SMALL:
                    mean = tl.sum(x, 0) / tl.sum(valid.to(tl.float32), 0)
                x_high, x_low = split(tl.where(mask, x - mean[None, :], 0.0))
                acc = tl.dot(low, x_high, acc)
                acc = tl.dot(high, x_low, acc)
                acc = tl.dot(high, x_high, acc)
            else:
                acc = tl.dot(low, x, acc)
                acc = tl.dot(high, x, acc)
                if not SMALL:
                    row_sums += tl.sum(m, 1)
        if not (SMALL or SPLIT):
            acc -= row_sums[:, None] * mean[None, :]
        valid = valid_rows(mask_ptr, row, n, HAS_MASK)
        inverse = tl.load(scalars_ptr + INVERSE)
        acc = tl.where(valid[:, None], acc * inverse * (inverse * incoming), 0.0)
        offsets = row.to(tl.int64)[:, None] * d + column[None, :]
        inside = (row < n)[:, None] & (column < d)[None, :]
        tl.store(grad_ptr + offsets, acc.to(grad_ptr.dtype.element_ty), mask=inside)


def launch(
    layers: Layers,
    config: Config,
    saved: Saved,
    incoming: Tensor,
    side: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """One side's gradients, side 0 being the student."""
    own = layers.x if side == 0 else layers.y
    grads, stride_gb = gradients(own, layers, dtype)
    if layers.idle:
        return grads
    entries, max_width = layers.entries, max(own.widths)
    width = saved.means.numel() // (entries * 2)
    block_m, block_n, block_k = config.gram_backward
    small = layers.max_rows <= SMALL_GRAM_ROWS
    if small:
        # One block holds all rows, and gives the mean of a column.
        block_m = block_k = rows_of(layers)
    grid = (-(-layers.max_rows // block_m) * -(-max_width // block_n), entries)
    gram_backward_kernel[grid](
        own.addresses, layers.mask_addresses, layers.padded(grads), layers.row_counts, own.columns,
        own.strides_n, own.strides_d, own.stride_b, layers.stride_mb, stride_gb,
        incoming, saved.grams, saved.means, width, stride_of(layers), max_width,
        **layers.feature_options, SIDE=side,
        SMALL=small, SPLIT=layers.is_split,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.gram_backward_warps, num_stages=config.gram_backward_stages,
    )  # fmt: skip
    return grads
