"""Second-moment blocks in float32, summed from partial tiles and mirrored below the diagonal.

Measures that are not fused, and ``second_moments``, are built from them; features come centered.

Bytes: the partial tiles once, the blocks once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import raw_moments
from .config import configuration
from .layers import Layers
from .tiles import shared_of, sum_partials, tile_of


@triton.jit(do_not_specialize=["n", "d1", "d2", "slots", "spills"])
def blocks_kernel(
    n, d1, d2, tiles_ptr, xx_ptr, xy_ptr, yy_ptr,
    tile_programs, shares, lengths, slots, spills,
    XX: tl.constexpr, YY: tl.constexpr,
    GRAM: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One program owns SUB rows of one tile."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    SIZE: tl.constexpr = BLOCK * BLOCK
    PARTS: tl.constexpr = BLOCK // SUB
    tiles_ptr += entry.to(tl.int64) * (slots + spills) * SIZE
    first, second = (n, n) if GRAM else (d1, d2)
    blocks_x, blocks_y = tl.cdiv(first, BLOCK), tl.cdiv(second, BLOCK)
    shared, share, length = shared_of(slots, tile_programs, shares, lengths, 0)
    slot, part = program // PARTS, program % PARTS
    left_is_y, block_i, right_is_y, block_j = tile_of(slot, blocks_x, blocks_y, XX, YY)
    within_i = part * SUB + tl.arange(0, SUB)
    within_j = tl.arange(0, BLOCK)
    i, j = block_i * BLOCK + within_i, block_j * BLOCK + within_j
    offsets = within_i[:, None] * BLOCK + within_j[None, :]
    tile = sum_partials(tiles_ptr, slot, slots, shared, share, length, offsets, SIZE)
    height = tl.where(left_is_y, second, first)
    width = tl.where(right_is_y, second, first)
    out = tl.where(left_is_y, yy_ptr, tl.where(right_is_y, xy_ptr, xx_ptr))
    out += entry.to(tl.int64) * height * width
    inside = (i < height)[:, None] & (j < width)[None, :]
    i64, j64 = i.to(tl.int64), j.to(tl.int64)
    tl.store(out + i64[:, None] * width + j64[None, :], tile, mask=inside)
    if (left_is_y == right_is_y) & (block_i != block_j):
        tl.store(out + j64[None, :] * width + i64[:, None], tile, mask=inside)


def second_moments(layers: Layers, form: str, wanted: str) -> tuple[Tensor | None, ...]:
    """The blocks xx, xy, yy of centered features in float32, (B, ., .) each; None if unwanted."""
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
        moments = raw_moments.launch(layers, config, form, wanted)
        placeholder = next(iter(results.values()))
        blocks_kernel[(moments.slots * (config.block // config.sub), layers.entries)](
            n, d1, d2, moments.tiles,
            *(results.get(name, placeholder) for name in shapes),
            *moments.deal, moments.slots, moments.spills,
            XX="xx" in wanted, YY="yy" in wanted, GRAM=is_gram,
            BLOCK=config.block, SUB=config.sub,
            num_warps=config.head_warps,
        )  # fmt: skip
    return tuple(results.get(name) for name in shapes)
