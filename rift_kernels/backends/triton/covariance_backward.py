"""Gradients in covariance form, of linear CKA and of the covariance distance: both products of one
side in one float32 accumulator.

    CKA        grad = g * (scale * (W P + Other R) + w * Own + V S), less its column means
    distance   grad = g * (scale * (W P + Own R) + bias)
               W = c Own + c' Other

``Own`` and ``Other`` are centered. ``planes`` hold P above R, in two bfloat16 numbers each.
Debiasing keeps long rows, S, out of P and R, and V are their columns of U-centered K and L. Every
other row has a weight ``w``, affine in the sums of its rows of K and L.

``W`` is formed in float32 and centered before it is rounded. bfloat16 features of the other side
are multiplied as they are. ``shift`` holds what their mean adds to a column of every row, which is
subtracted at the end. Low halves are multiplied where the scalars say so, and always for features
that are wider than bfloat16.

Bytes: per tile of the gradient, Own and Other once for W, and Other once more; P and R once each,
or three times and twice with the low halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Config
from .covariance_saved import (
    INVERSE_OTHER,
    INVERSE_OWN,
    LOW_HALVES,
    OTHER,
    OWN,
    ROW,
    SCALARS,
    SCALE,
    Saved,
    energy_programs,
)
from .device import (
    batch_of,
    features_of,
    layer_of,
    load_features,
    mask_of,
    multiple,
    pick,
    size,
    split,
    valid_rows,
)
from .launch import descriptors_of, gradients, padded_width
from .layers import Layers
from .row_terms import add_row_gradients


@triton.jit
def _features(
    ptr, descriptor, stride_n, stride_d, first_row, row, valid, first, column, width,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile (rows, columns) of features, 0 where it is masked or outside."""
    if DESCRIPTORS:
        tile = descriptor.load([first_row, first])
    else:
        tile = load_features(ptr, stride_n, stride_d, row, valid, column, width)
    return tile


@triton.jit
def _weighted(
    own_ptr, own_descriptor, own_n, own_d, mean_own_ptr, d_own, c_own,
    other_ptr, other_descriptor, other_n, other_d, mean_other_ptr, d_other, c_other,
    first_row, row, valid, first, column, NEAR: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of W in float32. Masked rows and columns outside hold finite numbers, because those
    rows of the gradient are 0, and so are the rows of the planes."""
    own = _features(
        own_ptr, own_descriptor, own_n, own_d, first_row, row, valid, first, column, d_own,
        DESCRIPTORS,
    )  # fmt: skip
    w = c_own * (own.to(tl.float32) - tl.load(mean_own_ptr + column)[None, :])
    if NEAR:
        other = _features(
            other_ptr, other_descriptor, other_n, other_d, first_row, row, valid, first, column,
            d_other, DESCRIPTORS,
        )  # fmt: skip
        w += c_other * (other.to(tl.float32) - tl.load(mean_other_ptr + column)[None, :])
    return w


@triton.jit
def _matrix(ptr, descriptor, first_row, inner, first, column, width, DESCRIPTORS: tl.constexpr):
    """A tile of the planes, which are padded to whole tiles."""
    if DESCRIPTORS:
        tile = descriptor.load([first_row, first])
    else:
        # Registers would run out with an address in 64 bits for every load.
        ptr += first_row.to(tl.int64) * width
        tile = tl.load(ptr + (inner[:, None] * width + column[None, :]))
    return tile


@triton.jit
def _store_gradient(
    acc, first, row, valid, n, d_own, d_other, own_ptr, own_n, own_d, grad_ptr,
    mean_own_ptr, mean_other_ptr, incoming_ptr, scalars_ptr, shift_ptr,
    row_sums_ptr, products_ptr, weighted_ptr, longest_ptr,
    entry, width, parts, max_rows, row_programs,
    SIDE: tl.constexpr, DEBIASED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    SHIFT_STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Complete the sums of both products over the columns from ``first`` on, and store them."""
    column = first + tl.arange(0, BLOCK_N)
    inside = column < d_own
    if not SPLIT:
        half = parts * width
        first_ptr = shift_ptr + entry.to(tl.int64) * 2 * half + column
        shift = tl.zeros([BLOCK_N], tl.float32)
        low_halves = tl.load(scalars_ptr + LOW_HALVES) != 0
        for step in range(tl.cdiv(d_other, SHIFT_STEP)):
            shift += tl.load(first_ptr + step * width, mask=inside, other=0.0)
            low = tl.load(first_ptr + half + step * width, mask=inside, other=0.0)
            shift += tl.where(low_halves, low, 0.0)
        acc -= shift[None, :]
    inverse_own = tl.load(scalars_ptr + INVERSE_OWN)
    acc *= inverse_own * tl.load(scalars_ptr + SCALE)
    acc *= tl.load(scalars_ptr + INVERSE_OTHER)
    if DEBIASED:
        acc = add_row_gradients(
            acc, row, valid, column, d_own, own_ptr, own_n, own_d, mean_own_ptr, inverse_own,
            scalars_ptr, row_sums_ptr, products_ptr, weighted_ptr, longest_ptr,
            entry, width, max_rows, row_programs, SIDE, BLOCK_N,
        )  # fmt: skip
    if BIAS:
        difference = tl.load(mean_own_ptr + column) - tl.load(mean_other_ptr + column)
        acc += (tl.load(scalars_ptr + ROW) * difference)[None, :]
    acc *= tl.load(incoming_ptr + entry).to(tl.float32)
    acc = tl.where(valid[:, None], acc, 0.0)
    offsets = row.to(tl.int64)[:, None] * d_own + column[None, :]
    bounds = (row < n)[:, None] & inside[None, :]
    tl.store(grad_ptr + offsets, acc.to(grad_ptr.dtype.element_ty), mask=bounds)


@triton.jit(
    do_not_specialize=[
        *("stride_own_b", "stride_other_b", "stride_mb", "stride_grad_b", "incoming_ptr"),
        *("parts", "max_rows", "row_programs"),
    ]
)
def covariance_backward_kernel(
    owns, others, masks, grads, rows, widths_own, widths_other,
    strides_own_n, strides_own_d, strides_other_n, strides_other_d,
    stride_own_b, stride_other_b, stride_mb, stride_grad_b,
    own_descriptor, other_descriptor, planes_descriptor,
    incoming_ptr, planes_ptr, scalars_ptr, shift_ptr, means_ptr,
    row_sums_ptr, products_ptr, weighted_ptr, longest_ptr,
    width, parts, max_rows, row_programs,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    SIDE: tl.constexpr,
    OWN_BLOCK: tl.constexpr, NEAR: tl.constexpr, DEBIASED: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr, SHIFT_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns a tile (BLOCK_M rows, BLOCK_N columns) of one layer's gradient."""
    entry = tl.program_id(1)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n = size(rows, layer)
    d_own, d_other = size(widths_own, layer, VECTOR), size(widths_other, layer, VECTOR)
    # Programs that share rows run together, and find these in the L2 cache.
    blocks_n = tl.cdiv(width, BLOCK_N)
    block_m, block_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n
    if (block_m * BLOCK_M < n) & (block_n * BLOCK_N < d_own):
        own_ptr, own_n, own_d = features_of(
            owns, strides_own_n, strides_own_d, stride_own_b, layer, batch, DTYPE, VECTOR
        )
        other_ptr, other_n, other_d = features_of(
            others, strides_other_n, strides_other_d, stride_other_b, layer, batch, DTYPE, VECTOR
        )
        mask_ptr = mask_of(masks, stride_mb, layer, batch, own_ptr, HAS_MASK)
        mean_own_ptr = means_ptr + (entry * 2 + SIDE) * width
        mean_other_ptr = means_ptr + (entry * 2 + 1 - SIDE) * width
        # Rows of one half of the planes: P above R, or R alone.
        height = width
        if OWN_BLOCK:
            height = 2 * width
        cross_mean_ptr = mean_other_ptr
        if BIAS:
            # In the covariance distance, R multiplies this side's own features.
            cross_mean_ptr = mean_own_ptr
        top = entry * 2 * height
        scalars_ptr += entry * 2 * SCALARS + SIDE * SCALARS
        c_own = tl.load(scalars_ptr + OWN)
        c_other = tl.load(scalars_ptr + OTHER)
        low_halves = tl.load(scalars_ptr + LOW_HALVES) != 0
        row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = valid_rows(mask_ptr, row, n, HAS_MASK)
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

        first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
        if OWN_BLOCK:
            steps = tl.cdiv(d_own, BLOCK_K)
            for step in range(steps):
                first_k = step * BLOCK_K
                k = first_k + inner
                w = _weighted(
                    own_ptr, own_descriptor, own_n, own_d, mean_own_ptr, d_own, c_own,
                    other_ptr, other_descriptor, other_n, other_d, mean_other_ptr, d_other,
                    c_other, first_m, row, valid, first_k, k, NEAR, DESCRIPTORS,
                )  # fmt: skip
                right = _matrix(
                    planes_ptr, planes_descriptor, top + first_k, inner, first_n, column,
                    width, DESCRIPTORS,
                )  # fmt: skip
                acc = tl.dot(w.to(tl.bfloat16), right, acc)
            # High times low, low times high. Apart, because forming low halves takes longer than
            # the products.
            passes = tl.where(low_halves, 2, 0)
            if SPLIT:
                passes = 2
            for step in range(passes * steps):
                product = step // steps
                first_k = (step - product * steps) * BLOCK_K
                k = first_k + inner
                w = _weighted(
                    own_ptr, own_descriptor, own_n, own_d, mean_own_ptr, d_own, c_own,
                    other_ptr, other_descriptor, other_n, other_d, mean_other_ptr, d_other,
                    c_other, first_m, row, valid, first_k, k, NEAR, DESCRIPTORS,
                )  # fmt: skip
                high, low = split(w)
                plane = top + tl.where(product == 0, height, 0)
                right = _matrix(
                    planes_ptr, planes_descriptor, plane + first_k, inner, first_n, column,
                    width, DESCRIPTORS,
                )  # fmt: skip
                acc = tl.dot(tl.where(product == 0, high, low), right, acc)
            top += width

        steps = tl.cdiv(d_other, BLOCK_K)
        passes = tl.where(low_halves, 2, 1)
        if SPLIT:
            passes = 3
        for step in range(passes * steps):
            product = step // steps
            first_k = (step - product * steps) * BLOCK_K
            k = first_k + inner
            other = _features(
                other_ptr, other_descriptor, other_n, other_d, first_m, row, valid, first_k, k,
                d_other, DESCRIPTORS,
            )  # fmt: skip
            if SPLIT:
                other = other.to(tl.float32) - tl.load(cross_mean_ptr + k)[None, :]
                other = tl.where(valid[:, None] & (k < d_other)[None, :], other, 0.0)
                high, low = split(other)
                other = tl.where(product == 2, low, high)
            plane = top + tl.where(product == 1, height, 0)
            right = _matrix(
                planes_ptr, planes_descriptor, plane + first_k, inner, first_n, column, width,
                DESCRIPTORS,
            )  # fmt: skip
            acc = tl.dot(other, right, acc)

        # What follows comes so late in order not to hold registers before.
        grad_ptr = pick(grads, layer) + batch * multiple(stride_grad_b, VECTOR)
        valid = valid_rows(mask_ptr, row, n, HAS_MASK)
        if BLOCK_N > BLOCK_M:
            # A half at a time, because registers hold no more beside the accumulator.
            halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1))
            left, right = tl.split(halves)
            HALF: tl.constexpr = BLOCK_N // 2
            for side in tl.static_range(2):
                _store_gradient(
                    left if side == 0 else right, first_n + side * HALF, row, valid, n, d_own,
                    d_other, own_ptr, own_n, own_d, grad_ptr, mean_own_ptr, mean_other_ptr,
                    incoming_ptr, scalars_ptr, shift_ptr, row_sums_ptr, products_ptr, weighted_ptr,
                    longest_ptr, entry, width, parts, max_rows, row_programs,
                    SIDE, DEBIASED, BIAS, SPLIT, SHIFT_STEP, HALF,
                )  # fmt: skip
        else:
            _store_gradient(
                acc, first_n, row, valid, n, d_own,
                d_other, own_ptr, own_n, own_d, grad_ptr, mean_own_ptr, mean_other_ptr,
                incoming_ptr, scalars_ptr, shift_ptr, row_sums_ptr, products_ptr, weighted_ptr,
                longest_ptr, entry, width, parts, max_rows, row_programs,
                SIDE, DEBIASED, BIAS, SPLIT, SHIFT_STEP, BLOCK_N,
            )  # fmt: skip


def launch(
    layers: Layers,
    config: Config,
    saved: Saved,
    incoming: Tensor,
    side: int,
    dtype: torch.dtype,
    *,
    near: bool,
    bias: bool,
    shift_step: int,
) -> tuple[Tensor, ...]:
    """One side's gradients, side 0 being the student.

    ``near``: W has a term of the other side. ``bias``: the covariance distance. ``shift_step``: how
    many columns of the right operand one sum of the shift covers.
    """
    entries, width = layers.entries, padded_width(layers, config)
    own, other = (layers.x, layers.y) if side == 0 else (layers.y, layers.x)
    planes = (saved.planes_x, saved.planes_y)[side]
    shift = (saved.shift_x, saved.shift_y)[side]
    cross = own if bias else other
    has_own_block = planes.numel() == entries * 4 * width * width
    debiased, is_split = saved.weighted.numel() > 0, shift.numel() == 0
    grads, stride_gb = gradients(own, layers, dtype)
    if layers.idle:
        return grads
    block_m, block_n, block_k = config.backward
    descriptors = None if is_split else descriptors_of(layers, (own, cross), (block_m, block_k))
    if not descriptors or width % block_n:
        # Addresses need the registers of wide tiles, and planes are padded to this block.
        block_n = min(block_n, config.block)
    grid = (-(-layers.max_rows // block_m) * -(-width // block_n), entries)
    if descriptors:
        matrix = planes.view(-1, width)
        descriptors.append(TensorDescriptor.from_tensor(matrix, [block_k, block_n]))
    covariance_backward_kernel[grid](
        own.addresses, cross.addresses, layers.mask_addresses, layers.padded(grads),
        layers.row_counts, own.columns, cross.columns,
        own.strides_n, own.strides_d, cross.strides_n, cross.strides_d,
        own.stride_b, cross.stride_b, layers.stride_mb, stride_gb,
        *(descriptors or (None, None, None)), incoming, planes, saved.scalars, shift, saved.means,
        saved.row_sums, saved.products, saved.weighted, saved.longest,
        width, width // config.sub, layers.max_rows, energy_programs(layers, debiased),
        **layers.feature_options, SIDE=side, OWN_BLOCK=has_own_block,
        NEAR=near, DEBIASED=debiased, BIAS=bias,
        SPLIT=is_split, DESCRIPTORS=descriptors is not None, SHIFT_STEP=shift_step,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.backward_warps, num_stages=config.backward_stages,
    )  # fmt: skip
    return grads
