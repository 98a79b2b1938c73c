"""From layers to launches of linear CKA: grids, workspaces, constants. No arithmetic on features.

    covariance form   moments, cka, backward             three launches for any number of layers
    Gram form         moments, gram, gram_backward       three
                      small_gram, gram_backward          two, up to 128 rows

float32 features take one more, for their means come first.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import backward, cka, gram, moments
from .config import Config, configuration
from .device import STATISTICS
from .layers import Layers, Side

SMALL_ROWS = 128


class Raw(NamedTuple):
    """What the first launch leaves to the next ones."""

    tiles: Tensor
    spill: Tensor
    row_sums: Tensor
    sums: Tensor
    statistics: Tensor
    counters: Tensor
    tile_programs: int
    column_programs: int
    segments: int
    width: int
    slots: int
    spills: int
    programs: int  # column_programs, as a power of two


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once; three on a CPU, to share the work of small tests."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _options(layers: Layers) -> dict[str, Any]:
    return {"LAYERS": len(layers.rows), "HAS_MASK": bool(layers.masks)}


def _tiles(first: int, second: int, wanted: str) -> int:
    count = 0
    if "xx" in wanted:
        count += first * (first + 1) // 2
    if "yy" in wanted:
        count += second * (second + 1) // 2
    return count + (first * second if "xy" in wanted else 0)


def raw_moments(
    layers: Layers, config: Config, form: str, wanted: str, *, off_diagonal: bool = False
) -> Raw:
    """Launch moments_kernel: partial products of the wanted blocks, column sums, statistics."""
    is_gram, block = form == "gram", config.block
    widest = max(*layers.x.widths, *layers.y.widths)
    width = _round_up(widest, block)
    triples = list(zip(layers.rows, layers.x.widths, layers.y.widths, strict=True))
    slots = max(
        _tiles(*(-(-d // block) for d in ((n, n) if is_gram else (d1, d2))), wanted)
        for n, d1, d2 in triples
    )
    steps = max(-(-(max(d1, d2) if is_gram else n) // config.block_k) for n, d1, d2 in triples)
    available = processors(layers.device)
    tile_programs = max(1, min(-(-available // layers.entries), slots * steps))
    blocks = width // block
    split = layers.dtype != torch.bfloat16
    segments = max(1, min(-(-layers.max_rows // (4 * config.block_r)), -(-available // blocks)))
    if split and is_gram:
        segments = 1
    column_programs = blocks * segments
    floats = {"dtype": torch.float32, "device": layers.device}
    entries, size = layers.entries, block * block
    raw = Raw(
        torch.empty(entries * slots * size, **floats),
        torch.empty(entries * tile_programs * size, **floats),
        torch.empty(entries * (slots + tile_programs) * (2 * block + 1) if is_gram else 0, **floats),
        torch.empty(entries * 2 * segments * width, **floats),
        torch.empty(entries * STATISTICS * _power(column_programs), **floats),
        torch.empty(entries, dtype=torch.int32, device=layers.device),
        tile_programs,
        column_programs,
        segments,
        width,
        slots,
        tile_programs,
        _power(column_programs),
    )
    # Means come first where they are taken off before the products.
    launches = [(0, column_programs), (tile_programs, 0)] if split else [(tile_programs, column_programs)]
    for tiles, columns in launches:
        moments.moments_kernel[(tiles + columns, entries)](
            *layers.shape, None, None,
            raw.tiles, raw.spill, raw.row_sums, raw.sums, raw.statistics, raw.counters,
            tiles, column_programs, segments, blocks, width, slots, tile_programs,
            **_options(layers), PROGRAMS=raw.programs, GRAM=is_gram,
            XX="xx" in wanted, YY="yy" in wanted, XY="xy" in wanted,
            SPLIT=split, OFF_DIAGONAL=off_diagonal, DESCRIPTORS=False,
            BLOCK=block, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return raw


def cka_covariance(
    layers: Layers, debiased: bool, student: bool, teacher: bool, high: bool
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`cka_covariance_backward` needs beside the features."""
    config = configuration(layers, "covariance")
    raw = raw_moments(layers, config, "covariance", "xx xy yy")
    entries, width, block = layers.entries, raw.width, config.block
    floats = {"dtype": torch.float32, "device": layers.device}
    halves = {"dtype": torch.bfloat16, "device": layers.device}
    row_programs = 0
    if debiased:
        row_programs = max(1, min(32, -(-layers.max_rows // config.block_r)))
    parts = block // config.sub
    plane, shift = entries * 4 * width * width, entries * 2 * (width // block) * parts * width
    exact = layers.dtype != torch.bfloat16
    values = torch.empty(entries, **floats)
    scalars = torch.empty(entries * 2 * cka.SCALARS, **floats)
    planes = [torch.empty(plane if side else 0, **halves) for side in (student, teacher)]
    shifts = [torch.empty(shift if side and not exact else 0, **floats) for side in (student, teacher)]
    means = torch.empty(entries * 2 * width, **floats)
    energies = torch.empty(entries * 2 * layers.max_rows if debiased else 0, **floats)
    weighted = torch.empty(entries * 4 * row_programs * width, **floats)
    programs = raw.slots * parts + row_programs
    partial = torch.empty(entries * programs * 16, dtype=torch.float64, device=layers.device)
    cka.cka_kernel[(programs, entries)](
        *layers.shape,
        raw.tiles, raw.spill, raw.sums, raw.statistics, raw.counters,
        values, scalars, *planes, *shifts, means, energies, weighted, partial,
        raw.tile_programs, raw.column_programs, raw.segments, width, raw.slots, raw.spills,
        layers.max_rows, row_programs,
        **_options(layers), PROGRAMS=raw.programs,
        SPLIT=exact, NEAR=layers.x.widths == layers.y.widths,
        SHIFT=not exact, DEBIASED=debiased, STUDENT=student, TEACHER=teacher, HIGH=high,
        BLOCK=block, BLOCK_K=config.block_k, SUB=config.sub, BLOCK_R=config.block_r,
        num_warps=config.head_warps,
    )  # fmt: skip
    return values, [scalars, *planes, *shifts, means, raw.statistics, energies, weighted]


def _gradients(side: Side, layers: Layers, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int]:
    grads = tuple(
        torch.empty(t.shape, dtype=dtype, device=layers.device) for t in side.tensors
    )
    return grads, grads[0][0].numel() if grads[0].dim() == 3 else 0


def cka_covariance_backward(
    layers: Layers, incoming: Tensor, saved: list[Tensor], side: int, debiased: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One side's gradients, side 0 being the student."""
    config = configuration(layers, "covariance")
    scalars, plane_x, plane_y, shift_x, shift_y, means, statistics, energies, weighted = saved
    own, other = (layers.x, layers.y) if side == 0 else (layers.y, layers.x)
    entries, block = layers.entries, config.block
    width = _round_up(max(*layers.x.widths, *layers.y.widths), block)
    row_programs = weighted.numel() // (entries * 4 * width)
    programs = statistics.numel() // (entries * STATISTICS)
    grads, stride_gb = _gradients(own, layers, dtype)
    block_m, block_n, block_k = config.backward
    grid = (-(-layers.max_rows // block_m) * -(-width // block_n), entries)
    backward.backward_kernel[grid](
        own.tensors, other.tensors, layers.masks, grads, layers.rows, own.widths, other.widths,
        own.strides_n, own.strides_d, other.strides_n, other.strides_d,
        own.stride_b, other.stride_b, layers.stride_mb, stride_gb,
        incoming, (plane_x, plane_y)[side], scalars, (shift_x, shift_y)[side], means, statistics,
        energies, weighted,
        programs, width, width // config.sub, layers.max_rows, row_programs,
        **_options(layers), PROGRAMS=programs, SIDE=side,
        NEAR=own.widths == other.widths, DEBIASED=debiased,
        EXACT=layers.dtype != torch.bfloat16, SHIFT_STEP=block if side == 0 else config.sub,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.backward_warps, num_stages=config.backward_stages,
    )  # fmt: skip
    return grads


def cka_gram(layers: Layers, debiased: bool, store: bool) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`cka_gram_backward` needs beside the features."""
    floats = {"dtype": torch.float32, "device": layers.device}
    entries, max_rows = layers.entries, layers.max_rows
    values = torch.empty(entries, **floats)
    scalars = torch.empty(entries * gram.SCALARS, **floats)
    grams = torch.empty(entries * 2 * max_rows * max_rows if store else 0, **floats)
    config = configuration(layers, "gram")
    if max_rows <= SMALL_ROWS:
        _small_gram(layers, config, values, scalars, grams, debiased, store)
        none = torch.empty(0, **floats)
        return values, [scalars, grams, none, none.clone()]
    raw = raw_moments(layers, config, "gram", "xx yy", off_diagonal=debiased)
    parts = config.block // config.sub
    programs = raw.slots // 2 * parts
    partial = torch.empty(entries * programs * 8, dtype=torch.float64, device=layers.device)
    gram.gram_kernel[(programs, entries)](
        layers.masks, layers.rows, layers.x.widths, layers.y.widths, layers.stride_mb,
        raw.tiles, raw.spill, raw.row_sums, raw.statistics, raw.counters,
        values, scalars, grams, partial,
        raw.tile_programs, raw.column_programs, raw.slots, raw.spills, max_rows,
        **_options(layers), PROGRAMS=raw.programs, DEBIASED=debiased, STORE=store,
        BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub, num_warps=config.head_warps,
    )  # fmt: skip
    return values, [scalars, grams, raw.sums, raw.statistics]


def _small_gram(
    layers: Layers, config: Config, values: Tensor, scalars: Tensor, grams: Tensor,
    debiased: bool, store: bool,
) -> None:  # fmt: skip
    widest = max(*layers.x.widths, *layers.y.widths)
    programs = _power(-(-widest // config.small_share))
    share = _round_up(-(-widest // programs), config.small_k)
    rows = max(16, _power(layers.max_rows))
    size = layers.entries * programs * (2 * rows * rows + 2) if programs > 1 else 0
    workspace = torch.empty(size, dtype=torch.float32, device=layers.device)
    gram.small_gram_kernel[(programs, layers.entries)](
        *layers.shape, workspace, _counters(layers), values, scalars, grams, layers.max_rows, share,
        **_options(layers), DEBIASED=debiased, STORE=store,
        ROWS=rows, BLOCK_K=config.small_k, PROGRAMS=programs,
        num_warps=8 if rows > 64 else 4, num_stages=2,
    )  # fmt: skip


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(layers: Layers) -> Tensor:
    """Zeros that the kernel leaves as zeros: one buffer a stream, fresh ones inside a CUDA graph.

    A graph may be replayed on any stream beside any other, so it gets its own, zeroed at replay.
    """
    device, entries = layers.device, layers.entries
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(entries, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _zeros or _zeros[key].numel() < entries:
        _zeros[key] = torch.zeros(_power(max(entries, 64)), dtype=torch.int32, device=device)
    return _zeros[key]


def cka_gram_backward(
    layers: Layers, incoming: Tensor, saved: list[Tensor], side: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One side's gradients, side 0 being the student."""
    config = configuration(layers, "gram")
    scalars, grams, sums, statistics = saved
    own = layers.x if side == 0 else layers.y
    entries, max_rows, max_width = layers.entries, layers.max_rows, max(own.widths)
    small = max_rows <= SMALL_ROWS
    width = _round_up(max(*layers.x.widths, *layers.y.widths), config.block)
    segments = sums.numel() // (entries * 2 * width)
    column_programs = width // config.block * segments
    grads, stride_gb = _gradients(own, layers, dtype)
    block_m, block_n, block_k = config.gram_backward
    if small:
        # The mean of a column is that of its one block.
        block_m = block_k = max(16, _power(max_rows))
    grid = (-(-max_rows // block_m) * -(-max_width // block_n), entries)
    gram.gram_backward_kernel[grid](
        own.tensors, layers.masks, grads, layers.rows, own.widths, own.strides_n, own.strides_d,
        own.stride_b, layers.stride_mb, stride_gb,
        incoming, grams, scalars, sums, statistics,
        column_programs, segments, width, max_rows, max_width,
        **_options(layers), PROGRAMS=_power(column_programs), SIDE=side,
        SMALL=small, EXACT=layers.dtype != torch.bfloat16,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.gram_backward_warps, num_stages=config.gram_backward_stages,
    )  # fmt: skip
    return grads
