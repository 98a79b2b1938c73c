"""Launches in covariance form: linear CKA, the covariance distance, and the gradients of both.

    moments, cka, backward            three for up to 24 layers
    moments, covariance, backward

float32 and float16 features take one more, for their means come first; and debiased CKA another,
which looks for long rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import backward, cka, covariance, longest
from .cka_head import SCALARS
from .config import Config, configuration
from .device import LONG_FIELDS, LONGEST
from .launch import descriptors_of, gradients, padded_width, processors, raw_moments
from .layers import Layers


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


SAVED = len(Saved._fields)


def _row_programs(layers: Layers, debiased: bool) -> int:
    """Programs that sum rows' energies: few, because the backward adds up what each leaves."""
    if not debiased:
        return 0
    return 2 if layers.device.type == "cpu" else 32


def _saved(
    layers: Layers, config: Config, matrices: tuple[int, int], debiased: bool = False
) -> Saved:
    """Empty tensors; ``matrices`` is how many either side's gradient multiplies, 0 for none."""
    entries, width = layers.entries, padded_width(layers, config)
    student, teacher = matrices
    plane = entries * 2 * width * width
    shift = 0 if layers.exact else entries * 2 * (width // config.sub) * width
    row_programs = _row_programs(layers, debiased)
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
        layers.empty(entries * 4 * row_programs * width),
        layers.empty(debiased * entries * LONG_FIELDS.value, dtype=torch.int32).zero_(),
    )


def _find_longest(layers: Layers, config: Config, found: Tensor) -> None:
    """Launch longest_kernel."""
    entries, width = layers.entries, padded_width(layers, config)
    # Twice as many as run at once, so that a run of rows is short.
    programs = -(-2 * processors(layers.device) // entries)
    programs = min(programs, -(-layers.max_rows // (2 * config.block_r)))
    # Fresh, at the price of a small launch: see gram_form.py.
    counters = torch.zeros(entries, dtype=torch.int32, device=layers.device)
    longest.longest_kernel[(programs, entries)](
        *layers.shape,
        layers.empty(entries * programs * 2 * width), layers.empty(entries * 2 * layers.max_rows),
        layers.empty(entries * programs * longest.TOTALS.value, dtype=torch.float64),
        layers.empty(entries * programs * 2 * LONGEST.value, dtype=torch.int32),
        found, counters, width, layers.max_rows,
        **layers.feature_options,
        BLOCK=config.block, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        num_warps=config.head_warps,
    )  # fmt: skip


def cka_fwd(
    layers: Layers, debiased: bool, distance: bool, student: bool, teacher: bool, high: bool
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`bwd` needs beside the features."""
    config = configuration(layers, "covariance")
    values = layers.values()
    saved = _saved(layers, config, (2 * student, 2 * teacher), debiased)
    if layers.idle:
        return values, list(saved)
    apart = None
    if debiased:
        apart = saved.longest
        _find_longest(layers, config, apart)
    raw = raw_moments(layers, config, "covariance", "xx xy yy", longest=apart)
    row_programs = _row_programs(layers, debiased)
    programs = raw.slots * (config.block // config.sub) + row_programs
    partial = layers.empty(layers.entries * programs * 16, dtype=torch.float64)
    cka.cka_kernel[(programs, layers.entries)](
        *layers.shape, apart,
        raw.tiles, raw.spill, raw.sums, raw.statistics, raw.counters,
        values, *saved[: SAVED - 1], partial,
        raw.tile_programs, raw.column_programs, raw.segments, raw.width, raw.slots,
        raw.tile_programs, layers.max_rows, row_programs,
        **layers.feature_options,
        SPLIT=layers.exact, NEAR=layers.x.widths == layers.y.widths,
        SHIFT=not layers.exact, DEBIASED=debiased, DISTANCE=distance,
        STUDENT=student, TEACHER=teacher, HIGH=high,
        BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub, BLOCK_R=config.block_r,
        num_warps=config.head_warps,
    )  # fmt: skip
    return values, list(saved)


def covariance_fwd(
    layers: Layers, scale: str, mean_weight: float, student: bool, teacher: bool
) -> tuple[Tensor, list[Tensor]]:
    """The covariance distance, and what :func:`bwd` needs beside the features."""
    config = configuration(layers, "covariance")
    values = layers.values()
    # Relative to its own norm, the teacher's gradient has two terms.
    saved = _saved(layers, config, (int(student), teacher * (2 if scale == "relative" else 1)))
    if layers.idle:
        return values, list(saved)
    raw = raw_moments(layers, config, "covariance", "xx yy")
    programs = raw.slots // 2 * (config.block // config.sub)
    partial = layers.empty(layers.entries * programs * 4, dtype=torch.float64)
    covariance.covariance_kernel[(programs, layers.entries)](
        layers.row_numbers, layers.x.columns,
        raw.tiles, raw.spill, raw.sums, raw.statistics, raw.counters,
        values, saved.scalars, saved.planes_x, saved.planes_y, saved.shift_x, saved.shift_y,
        saved.means, partial,
        mean_weight, raw.tile_programs, raw.column_programs, raw.segments, raw.width, raw.slots,
        raw.tile_programs,
        LAYERS=len(layers.rows), SPLIT=layers.exact,
        SHIFT=not layers.exact, KIND=covariance.KINDS[scale], STUDENT=student,
        TEACHER=teacher,
        BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub,
        num_warps=config.head_warps,
    )  # fmt: skip
    return values, list(saved)


def bwd(
    layers: Layers,
    incoming: Tensor,
    saved: list[Tensor],
    side: int,
    dtype: torch.dtype,
    is_cka: bool,
) -> tuple[Tensor, ...]:
    """One side's gradients of CKA or the covariance distance, side 0 being the student."""
    config = configuration(layers, "covariance")
    kept = Saved(*saved)
    entries, block, width = layers.entries, config.block, padded_width(layers, config)
    own, other = (layers.x, layers.y) if side == 0 else (layers.y, layers.x)
    planes, shift = (kept.planes_x, kept.planes_y)[side], (kept.shift_x, kept.shift_y)[side]
    cross = other if is_cka else own
    # The columns that one sum of the shift stands for.
    step = block if is_cka and side == 0 else config.sub
    two = planes.numel() == entries * 4 * width * width
    debiased, exact = kept.weighted.numel() > 0, shift.numel() == 0
    grads, stride_gb = gradients(own, layers, dtype)
    if layers.idle:
        return grads
    block_m, block_n, block_k = config.backward
    grid = (-(-layers.max_rows // block_m) * -(-width // block_n), entries)
    descriptors = None if exact else descriptors_of(layers, (own, cross), (block_m, block_k))
    if descriptors:
        matrix = planes.view(-1, width)
        descriptors.append(TensorDescriptor.from_tensor(matrix, [block_k, block_n]))
    backward.backward_kernel[grid](
        own.addresses, cross.addresses, layers.mask_numbers, layers.filled(grads),
        layers.row_numbers, own.columns, cross.columns,
        own.strides_n, own.strides_d, cross.strides_n, cross.strides_d,
        own.stride_b, cross.stride_b, layers.stride_mb, stride_gb,
        *(descriptors or (None, None, None)), incoming, planes, kept.scalars, shift, kept.means,
        kept.row_sums, kept.products, kept.weighted, kept.longest,
        width, width // config.sub, layers.max_rows, _row_programs(layers, debiased),
        **layers.feature_options, SIDE=side, OWN_BLOCK=two,
        NEAR=is_cka and own.widths == other.widths, DEBIASED=debiased, BIAS=not is_cka,
        EXACT=exact, DESCRIPTORS=descriptors is not None, SHIFT_STEP=step,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.backward_warps, num_stages=config.backward_stages,
    )  # fmt: skip
    return grads
