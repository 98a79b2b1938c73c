"""What every form's launches begin with: grids, workspaces, descriptors, raw second moments."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import blocks, tiles
from .config import Config, configuration
from .device import STATISTICS
from .layers import Layers, Side


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


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once; three on a CPU, to share the work of small tests."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The next power of two."""
    return triton.next_power_of_2(max(n, 1))


def round_up(n: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-n // step) * step


def _tiles(first: int, second: int, wanted: str) -> int:
    count = 0
    if "xx" in wanted:
        count += first * (first + 1) // 2
    if "yy" in wanted:
        count += second * (second + 1) // 2
    return count + (first * second if "xy" in wanted else 0)


def descriptors_of(
    layers: Layers, sides: tuple[Side, ...], block: tuple[int, int]
) -> list[TensorDescriptor] | None:
    """Of the sides' features for the copy engine of sm_90 and later, or None where it cannot.

    It takes one bfloat16 matrix without mask, rows aligned to 16 bytes and one behind the other.
    Small ones are not worth the microseconds that making a descriptor costs.
    """
    tensors = [side.tensors[0].squeeze(0) for side in sides]
    fits = layers.entries == len(layers.rows) == 1 and not layers.exact and not layers.masks
    if not fits or layers.max_rows < _descriptor_rows(layers.device):
        return None
    for tensor in tensors:
        stride_n, stride_d = tensor.stride()
        apart = stride_n >= tensor.shape[1] and stride_n % 8 == 0
        if not apart or stride_d != 1 or tensor.data_ptr() % 16:
            return None
    return [TensorDescriptor.from_tensor(tensor, list(block)) for tensor in tensors]


@cache
def _descriptor_rows(device: torch.device) -> float:
    """Rows from which the copy engine is used."""
    if device.type == "cpu":
        return 256
    has_engine = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return 1024 if has_engine else float("inf")


def padded_width(layers: Layers, config: Config) -> int:
    """The widest layer's, in whole blocks."""
    return round_up(max(*layers.x.widths, *layers.y.widths), config.block)


def raw_moments(
    layers: Layers,
    config: Config,
    form: str,
    wanted: str,
    *,
    off_diagonal: bool = False,
    longest: Tensor | None = None,
) -> Raw:
    """Launch moments_kernel: partial products of the wanted blocks, column sums, statistics.

    ``off_diagonal``: row sums without the diagonal. ``longest``: rows that have no part in any of
    it, by ``longest.py``.
    """
    is_gram, block = form == "gram", config.block
    width, entries, size = padded_width(layers, config), layers.entries, block * block
    triples = list(zip(layers.rows, layers.x.widths, layers.y.widths, strict=True))
    sizes = [(n, n) if is_gram else (d1, d2) for n, d1, d2 in triples]
    slots = max(_tiles(-(-first // block), -(-second // block), wanted) for first, second in sizes)
    steps = max(-(-(max(d1, d2) if is_gram else n) // config.block_k) for n, d1, d2 in triples)
    available = processors(layers.device)
    tile_programs = max(1, min(-(-available // entries), slots * steps))
    if layers.exact and layers.vector <= 1 and not is_gram:
        tile_programs = max(tile_programs, -(-slots * steps // (tiles.RUN.value // config.block_k)))
    blocks = width // block
    # float32 features in Gram form: their means are read in the inner loop, which wants no other.
    segments = 1
    if not (is_gram and layers.exact):
        segments = max(1, min(-(-layers.max_rows // (4 * config.block_r)), -(-available // blocks)))
    column_programs = blocks * segments
    parts = entries * (slots + tile_programs) if is_gram else 0
    raw = Raw(
        layers.empty(entries * slots * size),
        layers.empty(entries * tile_programs * size),
        layers.empty(parts * (2 * block + 1)),
        layers.empty(entries * 2 * segments * width),
        layers.empty(entries * STATISTICS * column_programs),
        layers.empty(entries, dtype=torch.int32),
        tile_programs,
        column_programs,
        segments,
        width,
        slots,
    )
    launches = [(tile_programs, column_programs)]
    if layers.exact:
        # Means come first where they are taken off before the products.
        launches = [(0, column_programs), (tile_programs, 0)]
    tile = (block, config.block_k) if is_gram else (config.block_k, block)
    descriptors = descriptors_of(layers, (layers.x, layers.y), tile)
    for some, columns in launches:
        tiles.moments_kernel[(some + columns, entries)](
            *layers.shape, *(descriptors or (None, None)), longest,
            raw.tiles, raw.spill, raw.row_sums, raw.sums, raw.statistics, raw.counters,
            some, column_programs, columns, segments, blocks, width, slots, tile_programs,
            **layers.feature_options, APART=longest is not None, GRAM=is_gram,
            XX="xx" in wanted, YY="yy" in wanted, XY="xy" in wanted,
            SPLIT=layers.exact, OFF_DIAGONAL=off_diagonal,
            DESCRIPTORS=descriptors is not None,
            BLOCK=block, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return raw


def gradients(side: Side, layers: Layers, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int]:
    """Empty gradients of a side, and the stride of their batch."""
    own = side.tensors[: layers.given]
    grads = tuple(torch.empty(t.shape, dtype=dtype, device=layers.device) for t in own)
    return grads, grads[0].shape[-2] * grads[0].shape[-1] if grads[0].dim() == 3 else 0


def second_moments(layers: Layers, form: str, wanted: str) -> tuple[Tensor | None, ...]:
    """The blocks xx, xy, yy of centered features in float32, (B, ., .) each; None if not wanted."""
    config = configuration(layers, form)
    is_gram = form == "gram"
    n, d1, d2 = layers.rows[0], layers.x.widths[0], layers.y.widths[0]
    first, second = (n, n) if is_gram else (d1, d2)
    shapes = {"xx": (first, first), "xy": (first, second), "yy": (second, second)}
    results = {
        name: layers.empty(layers.entries, *shape)
        for name, shape in shapes.items()
        if name in wanted
    }
    if not layers.idle:
        raw = raw_moments(layers, config, form, wanted)
        some = next(iter(results.values()))
        blocks.blocks_kernel[(raw.slots * (config.block // config.sub), layers.entries)](
            n, d1, d2, raw.tiles, raw.spill, *(results.get(name, some) for name in shapes),
            raw.tile_programs, raw.slots, raw.tile_programs,
            XX="xx" in wanted, YY="yy" in wanted, GRAM=is_gram,
            BLOCK=config.block, BLOCK_K=config.block_k, SUB=config.sub,
            num_warps=config.head_warps,
        )  # fmt: skip
    return tuple(results.get(name) for name in shapes)
