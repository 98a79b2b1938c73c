"""Raw second moments of [X | Y] and its column sums, from features.

    covariance form   Z^T Z of the virtual concatenation Z = [X | Y], contracted over the rows
    Gram form         X X^T and Y Y^T (or X Y^T), contracted over the columns

Only wanted tiles on or above the diagonal exist. Tile programs share their (tile, chunk) pairs
evenly, whatever the number of tiles, and read the same chunks at the same time (``tiles.deal``).
The next launch adds partial sums in a fixed order, so that no program waits and results repeat to
the last bit.

bfloat16 features are multiplied as they are, with products that are exact in float32, and means
are subtracted afterwards. Wider features are centered first and split into two bfloat16 numbers
each, which makes three products.

Bytes: each operand tile once per tile of the result, ``BLOCK_K * BLOCK`` elements at a time;
partial sums ``4 BLOCK^2`` a tile; the column programs read X and Y once more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import COUNT, STATISTICS, column_statistics, statistic
from .config import Config
from .device import (
    LONG_FIELDS,
    batch_of,
    features_of,
    layer_of,
    long_rows,
    mask_of,
    size,
    valid_rows,
)
from .launch import descriptors_of, padded_width, processors
from .layers import Layers, encoded
from .tile_products import accumulate
from .tiles import deals, piece_of, tile_of, work_of

# Tensor cores truncate: products two bits below a float32 sum, then the sum itself. A sum of N
# terms of one sign thus loses about N 2^-24 of itself. If means are large, that loss exceeds the
# moments that are left without them. So tiles are summed in runs of rows. A run begins at minus
# half of what earlier rows let it expect to add, and ends at plus half. Truncation towards zero
# then cancels. In a run of 2048 rows, the sum is at most 1024 terms. Products of bfloat16 numbers
# of this size end above the truncated bits. In Gram form terms are few, and centering removes what
# all sums lose alike. Centered features that are loaded element by element take more programs
# instead, with at most a run's rows of a tile each.
RUN = tl.constexpr(2048)
# A run is at most this many times as long as all before it, because few rows may not be typical.
GROWTH = tl.constexpr(8)


@triton.jit
def _rows(mask_ptr, begin, end, n, HAS_MASK: tl.constexpr):
    """The number of valid rows in ``begin..end``, up to RUN of them, as float32."""
    end = tl.minimum(end, n)
    rows = (end - begin).to(tl.float32)
    if HAS_MASK:
        rows = tl.sum(valid_rows(mask_ptr, begin + tl.arange(0, RUN), end, True).to(tl.float32), 0)
    return rows


@triton.jit(
    do_not_specialize=[
        *("stride_xb", "stride_yb", "stride_mb"),
        *("column_programs", "launch_columns", "segments", "blocks", "slots", "spills"),
    ]
)
def raw_moments_kernel(
    xs, ys, masks, rows, widths_x, widths_y, strides_xn, strides_xd, strides_yn, strides_yd,
    stride_xb, stride_yb, stride_mb, x_descriptor, y_descriptor, longest_ptr,
    tiles_ptr, row_sums_ptr, sums_ptr, statistics_ptr, counters_ptr,
    tile_programs, shares, lengths,
    column_programs, launch_columns, segments, blocks, width, slots, spills,
    LAYERS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr,
    APART: tl.constexpr, GRAM: tl.constexpr, XX: tl.constexpr, YY: tl.constexpr, XY: tl.constexpr,
    SPLIT: tl.constexpr, OFF_DIAGONAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile program owns whole tiles and part of a shared one, one column program a block of
    columns."""
    program = tl.program_id(0)
    entry = tl.program_id(1)
    layer, batch = layer_of(entry, LAYERS), batch_of(entry, LAYERS)
    n, d1, d2 = size(rows, layer), size(widths_x, layer, VECTOR), size(widths_y, layer, VECTOR)
    x_ptr, stride_xn, stride_xd = features_of(
        xs, strides_xn, strides_xd, stride_xb, layer, batch, DTYPE, VECTOR
    )
    y_ptr, stride_yn, stride_yd = features_of(
        ys, strides_yn, strides_yd, stride_yb, layer, batch, DTYPE, VECTOR
    )
    mask_ptr = mask_of(masks, stride_mb, layer, batch, x_ptr, HAS_MASK)
    sums_ptr += entry.to(tl.int64) * (2 * segments * width)
    statistics_ptr += entry * STATISTICS * column_programs
    if APART:
        longest_ptr += entry * LONG_FIELDS
    if program == 0:
        # The next launch counts arrivals from 0.
        tl.store(counters_ptr + entry, 0)
    # Column programs come first, and leave in the L2 cache what tile programs read.
    if program < launch_columns:
        longest = longest_ptr
        if APART:
            longest = long_rows(longest_ptr)
        column_statistics(
            x_ptr, y_ptr, mask_ptr, n, d1, d2, stride_xn, stride_xd, stride_yn, stride_yd,
            longest, sums_ptr, statistics_ptr, program, segments, blocks, width,
            HAS_MASK, APART, BLOCK, BLOCK_R, VECTOR,
        )  # fmt: skip
    else:
        program -= launch_columns
        row_sums_ptr += entry.to(tl.int64) * (slots + spills) * (2 * BLOCK + 1)
        blocks_x = tl.cdiv(n if GRAM else d1, BLOCK)
        blocks_y = tl.cdiv(n if GRAM else d2, BLOCK)
        tiles = blocks_x * 0
        if XX:
            tiles += blocks_x * (blocks_x + 1) // 2
        if YY:
            tiles += blocks_y * (blocks_y + 1) // 2
        if XY:
            tiles += blocks_x * blocks_y
        chunks = tl.cdiv(tl.maximum(d1, d2) if GRAM else n, BLOCK_K)
        programs, share = size(tile_programs, layer), size(shares, layer)
        length = size(lengths, layer)
        local = tl.arange(0, BLOCK)
        count = n.to(tl.float32)
        if SPLIT:
            count = statistic(statistics_ptr, COUNT, column_programs).to(tl.float32)
        turns, whole, shared, shared_first, shared_last = work_of(
            program, tiles, chunks, programs, share, length
        )
        for turn in range(turns):
            slot, first, last = piece_of(
                turn, program, programs, chunks, turns, whole, shared, shared_first, shared_last
            )
            part = tl.where(first == 0, slot, slots + program)
            out = entry * (slots + spills) + part
            a_is_y, a_block, b_is_y, b_block = tile_of(slot, blocks_x, blocks_y, XX, YY)
            a_side, b_side = a_block * BLOCK + local, b_block * BLOCK + local
            acc = tl.zeros([BLOCK, BLOCK], tl.float32)
            # Registers cannot hold a sum of runs besides addresses of single elements and halves.
            if GRAM or (SPLIT and VECTOR <= 1):
                acc = accumulate(
                    acc, x_ptr, y_ptr, x_descriptor, y_descriptor, mask_ptr, n, d1, d2,
                    stride_xn, stride_xd, stride_yn, stride_yd, longest_ptr,
                    sums_ptr, segments, width, count, a_is_y, a_block, b_is_y, b_block, first, last,
                    HAS_MASK, APART, GRAM, SPLIT, DESCRIPTORS, BLOCK, BLOCK_K,
                )  # fmt: skip
            else:
                # See RUN.
                rows_before = (n * 0).to(tl.float32)
                begin = first
                while begin < last:
                    growth = (rows_before * (GROWTH / BLOCK_K)).to(tl.int32)
                    stop = begin + tl.minimum(tl.maximum(growth, 1), RUN // BLOCK_K)
                    stop = tl.minimum(stop, last)
                    run_rows = _rows(mask_ptr, begin * BLOCK_K, stop * BLOCK_K, n, HAS_MASK)
                    weight = run_rows / (2 * tl.maximum(rows_before, 1))
                    # With few digits, so that adding 1 is exact. The first run weighs nothing.
                    weight = weight.to(tl.bfloat16).to(tl.float32)
                    acc = (1 + weight) * acc + accumulate(
                        -weight * acc, x_ptr, y_ptr, x_descriptor, y_descriptor, mask_ptr,
                        n, d1, d2,
                        stride_xn, stride_xd, stride_yn, stride_yd, longest_ptr,
                        sums_ptr, segments, width,
                        count, a_is_y, a_block, b_is_y, b_block, begin, stop,
                        HAS_MASK, APART, GRAM, SPLIT, DESCRIPTORS, BLOCK, BLOCK_K,
                    )  # fmt: skip
                    rows_before += run_rows
                    begin = stop
            offsets = local[:, None] * BLOCK + local[None, :]
            tl.store(tiles_ptr + out.to(tl.int64) * (BLOCK * BLOCK) + offsets, acc)
            if GRAM and not XY:
                if OFF_DIAGONAL:
                    acc = tl.where(a_side[:, None] == b_side[None, :], 0.0, acc)
                sums_out = row_sums_ptr + part * (2 * BLOCK) + local
                tl.store(sums_out, tl.sum(acc, 1))
                tl.store(sums_out + BLOCK, tl.sum(acc, 0))
                # Read back, because triton cannot sum a reduced accumulator again on sm_100.
                tl.debug_barrier()
                total = tl.sum(tl.load(sums_out), 0) * tl.where(a_block == b_block, 1.0, 2.0)
                tl.store(row_sums_ptr + (slots + spills) * (2 * BLOCK) + part, total)


class RawMoments(NamedTuple):
    """What the first launch leaves to the next ones."""

    # A sum per slot, from the program that began the tile, and one per program that began in the
    # middle of a tile.
    tiles: Tensor
    row_sums: Tensor  # in Gram form: sums of the rows, the columns and all of these
    sums: Tensor  # of columns, per segment of rows
    statistics: Tensor  # see columns.py
    counters: Tensor  # of programs that arrived in the next launch
    deal: tuple[tuple[int, ...], ...]  # the fields of tiles.Deal, one number a layer, encoded
    column_programs: int
    segments: int
    width: int
    slots: int  # tiles of the layer that has most
    spills: int  # tile programs of the layer that has most

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order in which kernels take them."""
        return self[:5]


def _count_tiles(first: int, second: int, wanted: str) -> int:
    """Tiles of the wanted blocks, from the tiles along either side."""
    count = 0
    if "xx" in wanted:
        count += first * (first + 1) // 2
    if "yy" in wanted:
        count += second * (second + 1) // 2
    return count + (first * second if "xy" in wanted else 0)


def launch(
    layers: Layers,
    config: Config,
    form: str,
    wanted: str,
    *,
    off_diagonal: bool = False,
    longest: Tensor | None = None,
) -> RawMoments:
    """Partial products of the wanted blocks, column sums, statistics.

    ``off_diagonal``: row sums leave out the diagonal. ``longest``: records of longest.py, whose
    rows are left out altogether.
    """
    is_gram, block = form == "gram", config.block
    width, entries, size = padded_width(layers, config), layers.entries, block * block
    shapes = list(zip(layers.rows, layers.x.widths, layers.y.widths, strict=True))
    sides = [(n, n) if is_gram else (d1, d2) for n, d1, d2 in shapes]
    counts = [_count_tiles(-(-a // block), -(-b // block), wanted) for a, b in sides]
    chunks = [-(-(max(d1, d2) if is_gram else n) // config.block_k) for n, d1, d2 in shapes]
    available = processors(layers.device)
    most = None
    if layers.is_split and layers.vector <= 1 and not is_gram:
        most = RUN.value // config.block_k
    own = slice(layers.layer_count)
    dealt = deals(counts[own], chunks[own], entries, available, most)
    dealt += dealt[-1:] * (len(shapes) - len(dealt))
    slots, spills = max(counts), max(deal.programs for deal in dealt)
    blocks = width // block
    # In Gram form the inner loop reads the means of split features, and must hold no other loop.
    segments = 1
    if not (is_gram and layers.is_split):
        segments = max(1, min(-(-layers.max_rows // (4 * config.block_r)), -(-available // blocks)))
    column_programs = blocks * segments
    parts = entries * (slots + spills) if is_gram else 0
    moments = RawMoments(
        layers.empty(entries * (slots + spills) * size),
        layers.empty(parts * (2 * block + 1)),
        layers.empty(entries * 2 * segments * width),
        layers.empty(entries * STATISTICS.value * column_programs),
        layers.empty(entries, dtype=torch.int32),
        tuple(map(encoded, zip(*dealt, strict=True))),
        column_programs,
        segments,
        width,
        slots,
        spills,
    )
    launches = [(spills, column_programs)]
    if layers.is_split:
        # Means come first, because features are centered before the products.
        launches = [(0, column_programs), (spills, 0)]
    tile = (block, config.block_k) if is_gram else (config.block_k, block)
    descriptors = descriptors_of(layers, (layers.x, layers.y), tile)
    for tile_count, column_count in launches:
        raw_moments_kernel[(tile_count + column_count, entries)](
            *layers.arguments, *(descriptors or (None, None)), longest,
            *moments.tensors, *moments.deal,
            column_programs, column_count, segments, blocks, width, slots, spills,
            **layers.feature_options, APART=longest is not None, GRAM=is_gram,
            XX="xx" in wanted, YY="yy" in wanted, XY="xy" in wanted,
            SPLIT=layers.is_split, OFF_DIAGONAL=off_diagonal,
            DESCRIPTORS=descriptors is not None,
            BLOCK=block, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return moments
