"""Launches in Gram form: linear CKA and its gradient.

small_gram, gram_backward         two for up to 24 layers of up to 128 rows
moments, gram, gram_backward      three beyond; one more for float32 and float16
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gram, gram_backward, small_gram
from .config import Config, configuration
from .launch import gradients, padded_width, power_of_two, raw_moments, round_up
from .layers import Layers

SMALL_ROWS = 128
SAVED = 2


def cka_fwd(
    layers: Layers, debiased: bool, distance: bool, store: bool
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`cka_bwd` needs beside the features."""
    config = configuration(layers, "gram")
    entries, max_rows = layers.entries, layers.max_rows
    values = layers.values()
    # The scalars of all entries, then both matrices of each: one allocation for both.
    stride = round_up(max_rows, 16)
    kept = layers.empty(entries * (gram.SCALARS.value + store * 2 * stride * stride))
    # Of columns, for the backward where rows do not fit into one block.
    needed = store and max_rows > SMALL_ROWS
    means = layers.empty(needed * entries * 2 * padded_width(layers, config))
    saved = [kept, means]
    if layers.idle:
        return values, saved
    if max_rows <= SMALL_ROWS:
        _small_gram(layers, config, values, kept, stride, debiased, distance, store)
        return values, saved
    raw = raw_moments(layers, config, "gram", "xx yy", off_diagonal=debiased)
    programs = raw.slots // 2 * (config.block // config.sub)
    partial = layers.empty(entries * programs * 8, dtype=torch.float64)
    gram.gram_kernel[(programs, entries)](
        layers.mask_numbers, layers.row_numbers, layers.x.columns, layers.y.columns,
        layers.stride_mb,
        raw.tiles, raw.spill, raw.row_sums, raw.sums, raw.statistics, raw.counters,
        values, kept, means, partial,
        raw.tile_programs, raw.column_programs, raw.segments, raw.width, raw.slots,
        raw.tile_programs, stride,
        **layers.options, DEBIASED=debiased, DISTANCE=distance, STORE=store,
        BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub, num_warps=config.head_warps,
    )  # fmt: skip
    return values, saved


def small_rows(layers: Layers) -> int:
    """Of the kernels for few rows: two sizes, those of the configurations' classes."""
    return 64 if layers.max_rows <= 64 else SMALL_ROWS


def _small_gram(
    layers: Layers,
    config: Config,
    values: Tensor,
    kept: Tensor,
    stride: int,
    debiased: bool,
    distance: bool,
    store: bool,
) -> None:
    programs = power_of_two(-(-layers.widest // config.small_share))
    share = round_up(-(-layers.widest // programs), config.small_k)
    rows = small_rows(layers)
    workspace = layers.empty(layers.entries * programs * (2 * rows * rows + 4))
    # Fresh ones, at the price of one small launch: memory kept between calls would have to be one a
    # stream, and inside CUDA graphs it would belong to nobody.
    counters = None
    if programs > 1:
        counters = torch.zeros(layers.entries, dtype=torch.int32, device=layers.device)
    small_gram.small_gram_kernel[(programs, layers.entries)](
        *layers.shape, workspace, counters, values, kept, stride, share,
        **layers.feature_options, DEBIASED=debiased, DISTANCE=distance, STORE=store,
        ROWS=rows, BLOCK_K=config.small_k, PROGRAMS=programs,
        num_warps=8 if rows > 64 else 4, num_stages=2,
    )  # fmt: skip


def cka_bwd(
    layers: Layers, incoming: Tensor, saved: list[Tensor], side: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One side's gradients, side 0 being the student."""
    config = configuration(layers, "gram")
    kept, means = saved
    own = layers.x if side == 0 else layers.y
    entries, max_rows, max_width = layers.entries, layers.max_rows, max(own.widths)
    small = max_rows <= SMALL_ROWS
    grads, stride_gb = gradients(own, layers, dtype)
    if layers.idle:
        return grads
    width = means.numel() // (entries * 2)
    block_m, block_n, block_k = config.gram_backward
    if small:
        # The mean of a column is that of its one block.
        block_m = block_k = small_rows(layers)
    grid = (-(-max_rows // block_m) * -(-max_width // block_n), entries)
    gram_backward.gram_backward_kernel[grid](
        own.addresses, layers.mask_numbers, layers.filled(grads), layers.row_numbers, own.columns,
        own.strides_n, own.strides_d, own.stride_b, layers.stride_mb, stride_gb,
        incoming, kept, means, width, round_up(max_rows, 16), max_width,
        **layers.feature_options, SIDE=side,
        SMALL=small, EXACT=layers.exact,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.gram_backward_warps, num_stages=config.gram_backward_stages,
    )  # fmt: skip
    return grads
