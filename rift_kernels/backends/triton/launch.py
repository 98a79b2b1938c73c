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
from triton.tools.tensor_descriptor import TensorDescriptor

from . import backward, cka, gram, tiles
from . import blocks as block_kernel
from . import covariance as covariances
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


def _tiles(first: int, second: int, wanted: str) -> int:
    count = 0
    if "xx" in wanted:
        count += first * (first + 1) // 2
    if "yy" in wanted:
        count += second * (second + 1) // 2
    return count + (first * second if "xy" in wanted else 0)


def _descriptors(
    layers: Layers, sides: tuple[Side, ...], block: tuple[int, int]
) -> list[TensorDescriptor] | None:
    """Of the sides' features for the copy engine of sm_90 and later, or None where it cannot.

    It takes one bfloat16 matrix without mask, rows aligned to 16 bytes. Small ones are not worth
    the microseconds that making a descriptor costs.
    """
    tensors = [side.tensors[0].squeeze(0) for side in sides]
    fits = layers.entries == 1 and not layers.exact and not layers.masks
    if not fits or layers.max_rows < _descriptor_rows(layers.device):
        return None
    for tensor in tensors:
        stride_n, stride_d = tensor.stride()
        if stride_d != 1 or stride_n % 8 or tensor.data_ptr() % 16:
            return None
    return [TensorDescriptor.from_tensor(tensor, list(block)) for tensor in tensors]


@cache
def _descriptor_rows(device: torch.device) -> float:
    """Rows from which the copy engine is used."""
    if device.type == "cpu":
        return 256
    has_engine = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return 1024 if has_engine else float("inf")


def _width(layers: Layers, config: Config) -> int:
    """The widest layer's, in whole blocks."""
    return _round_up(max(*layers.x.widths, *layers.y.widths), config.block)


def raw_moments(
    layers: Layers, config: Config, form: str, wanted: str, *, off_diagonal: bool = False
) -> Raw:
    """Launch moments_kernel: partial products of the wanted blocks, column sums, statistics."""
    is_gram, block = form == "gram", config.block
    width, entries, size = _width(layers, config), layers.entries, block * block
    triples = list(zip(layers.rows, layers.x.widths, layers.y.widths, strict=True))
    slots = max(
        _tiles(*(-(-d // block) for d in ((n, n) if is_gram else (d1, d2))), wanted)
        for n, d1, d2 in triples
    )
    steps = max(-(-(max(d1, d2) if is_gram else n) // config.block_k) for n, d1, d2 in triples)
    available = processors(layers.device)
    tile_programs = max(1, min(-(-available // entries), slots * steps))
    blocks = width // block
    # float32 features in Gram form: their means are read in the inner loop, which wants no other.
    segments = 1
    if not (is_gram and layers.exact):
        segments = max(1, min(-(-layers.max_rows // (4 * config.block_r)), -(-available // blocks)))
    column_programs = blocks * segments
    programs = _power(column_programs)
    floats = {"dtype": torch.float32, "device": layers.device}
    parts = entries * (slots + tile_programs) if is_gram else 0
    raw = Raw(
        torch.empty(entries * slots * size, **floats),
        torch.empty(entries * tile_programs * size, **floats),
        torch.empty(parts * (2 * block + 1), **floats),
        torch.empty(entries * 2 * segments * width, **floats),
        torch.empty(entries * STATISTICS * programs, **floats),
        torch.empty(entries, dtype=torch.int32, device=layers.device),
        tile_programs,
        column_programs,
        segments,
        width,
        slots,
        programs,
    )
    launches = [(tile_programs, column_programs)]
    if layers.exact:
        # Means come first where they are taken off before the products.
        launches = [(0, column_programs), (tile_programs, 0)]
    tile = (block, config.block_k) if is_gram else (config.block_k, block)
    descriptors = _descriptors(layers, (layers.x, layers.y), tile)
    for some, columns in launches:
        tiles.moments_kernel[(some + columns, entries)](
            *layers.shape, *(descriptors or (None, None)),
            raw.tiles, raw.spill, raw.row_sums, raw.sums, raw.statistics, raw.counters,
            some, column_programs, segments, blocks, width, slots, tile_programs,
            **layers.options, PROGRAMS=programs, GRAM=is_gram,
            XX="xx" in wanted, YY="yy" in wanted, XY="xy" in wanted,
            SPLIT=layers.exact, OFF_DIAGONAL=off_diagonal,
            DESCRIPTORS=descriptors is not None,
            BLOCK=block, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return raw


class Saved(NamedTuple):
    """What the backward in covariance form needs beside the features."""

    scalars: Tensor
    planes_x: Tensor
    planes_y: Tensor
    shift_x: Tensor
    shift_y: Tensor
    means: Tensor
    energies: Tensor
    weighted: Tensor


COVARIANCE_SAVED = len(Saved._fields)
GRAM_SAVED = 3


def _row_programs(layers: Layers, debiased: bool) -> int:
    """Programs that sum rows' energies: few, because the backward adds up what each leaves."""
    if not debiased:
        return 0
    return 2 if layers.device.type == "cpu" else 32


def _saved(
    layers: Layers, config: Config, matrices: tuple[int, int], debiased: bool = False
) -> Saved:
    """Empty tensors; ``matrices`` is how many either side's gradient multiplies, 0 for none."""
    entries, width = layers.entries, _width(layers, config)
    floats = {"dtype": torch.float32, "device": layers.device}
    halves = {"dtype": torch.bfloat16, "device": layers.device}
    student, teacher = matrices
    plane = entries * 2 * width * width
    shift = 0 if layers.exact else entries * 2 * (width // config.sub) * width
    row_programs = _row_programs(layers, debiased)
    return Saved(
        torch.empty(entries * 2 * cka.SCALARS, **floats),
        torch.empty(plane * student, **halves),
        torch.empty(plane * teacher, **halves),
        torch.empty(shift if student else 0, **floats),
        torch.empty(shift if teacher else 0, **floats),
        torch.empty(entries * 2 * width, **floats),
        torch.empty(entries * 2 * layers.max_rows if debiased else 0, **floats),
        torch.empty(entries * 4 * row_programs * width, **floats),
    )


def cka_covariance(
    layers: Layers, debiased: bool, student: bool, teacher: bool, high: bool
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`covariance_backward` needs beside the features."""
    config = configuration(layers, "covariance")
    values = torch.empty(layers.entries, dtype=torch.float32, device=layers.device)
    saved = _saved(layers, config, (2 * student, 2 * teacher), debiased)
    if layers.idle:
        return values, list(saved)
    raw = raw_moments(layers, config, "covariance", "xx xy yy")
    row_programs = _row_programs(layers, debiased)
    programs = raw.slots * (config.block // config.sub) + row_programs
    partial = torch.empty(
        layers.entries * programs * 16, dtype=torch.float64, device=layers.device
    )
    cka.cka_kernel[(programs, layers.entries)](
        *layers.shape,
        raw.tiles, raw.spill, raw.sums, raw.statistics, raw.counters,
        values, *saved, partial,
        raw.tile_programs, raw.column_programs, raw.segments, raw.width, raw.slots,
        raw.tile_programs, layers.max_rows, row_programs,
        **layers.options, PROGRAMS=raw.programs,
        SPLIT=layers.exact, NEAR=layers.x.widths == layers.y.widths,
        SHIFT=not layers.exact, DEBIASED=debiased, STUDENT=student, TEACHER=teacher, HIGH=high,
        BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub, BLOCK_R=config.block_r,
        num_warps=config.head_warps,
    )  # fmt: skip
    return values, list(saved)


def covariance(
    layers: Layers, scale: str, mean_weight: float, student: bool, teacher: bool
) -> tuple[Tensor, list[Tensor]]:
    """The covariance distance, and what :func:`covariance_backward` needs beside the features."""
    config = configuration(layers, "covariance")
    values = torch.empty(layers.entries, dtype=torch.float32, device=layers.device)
    # Relative to its own norm, the teacher's gradient has two terms.
    saved = _saved(layers, config, (int(student), teacher * (2 if scale == "relative" else 1)))
    if layers.idle:
        return values, list(saved)
    raw = raw_moments(layers, config, "covariance", "xx yy")
    programs = raw.slots // 2 * (config.block // config.sub)
    partial = torch.empty(layers.entries * programs * 4, dtype=torch.float64, device=layers.device)
    covariances.covariance_kernel[(programs, layers.entries)](
        layers.rows, layers.x.widths,
        raw.tiles, raw.spill, raw.sums, raw.statistics, raw.counters,
        values, saved.scalars, saved.planes_x, saved.planes_y, saved.shift_x, saved.shift_y,
        saved.means, partial,
        mean_weight, raw.tile_programs, raw.column_programs, raw.segments, raw.width, raw.slots,
        raw.tile_programs,
        LAYERS=len(layers.rows), PROGRAMS=raw.programs, SPLIT=layers.exact,
        SHIFT=not layers.exact, KIND=covariances.KINDS[scale], STUDENT=student,
        TEACHER=teacher,
        BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub,
        num_warps=config.head_warps,
    )  # fmt: skip
    return values, list(saved)


def blocks(layers: Layers, form: str, wanted: str) -> tuple[Tensor | None, ...]:
    """The blocks xx, xy, yy of second moments in float32, (B, ., .) each; None if not wanted."""
    config = configuration(layers, form)
    is_gram = form == "gram"
    n, d1, d2 = layers.rows[0], layers.x.widths[0], layers.y.widths[0]
    first, second = (n, n) if is_gram else (d1, d2)
    shapes = {"xx": (first, first), "xy": (first, second), "yy": (second, second)}
    results = {
        name: torch.empty(layers.entries, *shape, dtype=torch.float32, device=layers.device)
        for name, shape in shapes.items()
        if name in wanted
    }
    if not layers.idle:
        raw = raw_moments(layers, config, form, wanted)
        some = next(iter(results.values()))
        block_kernel.blocks_kernel[(raw.slots * (config.block // config.sub), layers.entries)](
            n, d1, d2, raw.tiles, raw.spill, raw.sums, raw.statistics,
            *(results.get(name, some) for name in shapes),
            raw.tile_programs, raw.column_programs, raw.segments, raw.width, raw.slots,
            raw.tile_programs,
            PROGRAMS=raw.programs, XX="xx" in wanted, YY="yy" in wanted, XY="xy" in wanted,
            CENTER=not layers.exact and not is_gram, GRAM=is_gram,
            BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub,
            num_warps=config.head_warps,
        )  # fmt: skip
    return tuple(results.get(name) for name in shapes)


def _gradients(side: Side, layers: Layers, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int]:
    grads = tuple(
        torch.empty(t.shape, dtype=dtype, device=layers.device) for t in side.tensors
    )
    return grads, grads[0].shape[-2] * grads[0].shape[-1] if grads[0].dim() == 3 else 0


def covariance_backward(
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
    entries, block, width = layers.entries, config.block, _width(layers, config)
    own, other = (layers.x, layers.y) if side == 0 else (layers.y, layers.x)
    planes, shift = (kept.planes_x, kept.planes_y)[side], (kept.shift_x, kept.shift_y)[side]
    cross = other if is_cka else own
    # The columns that one sum of the shift stands for.
    step = block if is_cka and side == 0 else config.sub
    two = planes.numel() == entries * 4 * width * width
    debiased, exact = kept.weighted.numel() > 0, shift.numel() == 0
    grads, stride_gb = _gradients(own, layers, dtype)
    if layers.idle:
        return grads
    block_m, block_n, block_k = config.backward
    grid = (-(-layers.max_rows // block_m) * -(-width // block_n), entries)
    descriptors = None if exact else _descriptors(layers, (own, cross), (block_m, block_k))
    if descriptors:
        matrix = planes.view(-1, width)
        descriptors.append(TensorDescriptor.from_tensor(matrix, [block_k, block_n]))
    backward.backward_kernel[grid](
        own.tensors, cross.tensors, layers.masks, grads, layers.rows, own.widths, cross.widths,
        own.strides_n, own.strides_d, cross.strides_n, cross.strides_d,
        own.stride_b, cross.stride_b, layers.stride_mb, stride_gb,
        *(descriptors or (None, None, None)), incoming, planes, kept.scalars, shift, kept.means,
        kept.energies, kept.weighted,
        width, width // config.sub, layers.max_rows, _row_programs(layers, debiased),
        **layers.options, SIDE=side, OWN_BLOCK=two,
        NEAR=is_cka and own.widths == other.widths, DEBIASED=debiased, BIAS=not is_cka,
        EXACT=exact, DESCRIPTORS=descriptors is not None, SHIFT_STEP=step,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.backward_warps, num_stages=config.backward_stages,
    )  # fmt: skip
    return grads


def cka_gram(layers: Layers, debiased: bool, store: bool) -> tuple[Tensor, list[Tensor]]:
    """Values, and what :func:`cka_gram_backward` needs beside the features."""
    config = configuration(layers, "gram")
    floats = {"dtype": torch.float32, "device": layers.device}
    entries, max_rows = layers.entries, layers.max_rows
    values = torch.empty(entries, **floats)
    scalars = torch.empty(entries * gram.SCALARS, **floats)
    grams = torch.empty(entries * 2 * max_rows * max_rows if store else 0, **floats)
    # Read only where rows do not fit into one block, and features are not multiplied as they are.
    sums = torch.empty(entries * 2 * _width(layers, config) if layers.exact else 0, **floats)
    saved = [scalars, grams, sums]
    if layers.idle:
        return values, saved
    if max_rows <= SMALL_ROWS:
        _small_gram(layers, config, values, scalars, grams, debiased, store)
        return values, saved
    raw = raw_moments(layers, config, "gram", "xx yy", off_diagonal=debiased)
    programs = raw.slots // 2 * (config.block // config.sub)
    partial = torch.empty(entries * programs * 8, dtype=torch.float64, device=layers.device)
    gram.gram_kernel[(programs, entries)](
        layers.masks, layers.rows, layers.x.widths, layers.y.widths, layers.stride_mb,
        raw.tiles, raw.spill, raw.row_sums, raw.statistics, raw.counters,
        values, scalars, grams, partial,
        raw.tile_programs, raw.column_programs, raw.slots, raw.tile_programs, max_rows,
        **layers.options, PROGRAMS=raw.programs, DEBIASED=debiased, STORE=store,
        BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub, num_warps=config.head_warps,
    )  # fmt: skip
    return values, [scalars, grams, raw.sums if layers.exact else sums]


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
        **layers.options, DEBIASED=debiased, STORE=store,
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
    scalars, grams, sums = saved
    own = layers.x if side == 0 else layers.y
    entries, max_rows, max_width = layers.entries, layers.max_rows, max(own.widths)
    small = max_rows <= SMALL_ROWS
    width = sums.numel() // (entries * 2)
    grads, stride_gb = _gradients(own, layers, dtype)
    if layers.idle:
        return grads
    block_m, block_n, block_k = config.gram_backward
    if small:
        # The mean of a column is that of its one block.
        block_m = block_k = max(16, _power(max_rows))
    grid = (-(-max_rows // block_m) * -(-max_width // block_n), entries)
    gram.gram_backward_kernel[grid](
        own.tensors, layers.masks, grads, layers.rows, own.widths, own.strides_n, own.strides_d,
        own.stride_b, layers.stride_mb, stride_gb,
        incoming, grams, scalars, sums, width, max_rows, max_width,
        **layers.options, SIDE=side,
        SMALL=small, EXACT=sums.numel() > 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=config.gram_backward_warps, num_stages=config.gram_backward_stages,
    )  # fmt: skip
    return grads
