"""Device functions that all kernels share: features of a layer, rows, float32 in halves, sums.

Layers come as tuples of addresses and sizes, passed by value. No features are copied, no table is
uploaded, and CUDA graphs can replay a launch. A batch ``(B, N, D)`` is one layer with a batch
stride. ``VECTOR`` alone says what sizes and addresses are multiples of; see layers.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Debiasing keeps at most LONGEST rows apart, see longest.py. A layer's record has their indices,
# the longest first, then -1; at LONG_COUNT their number; from CHUNKS on the chunks that hold them;
# from ARRIVALS on how many programs of each group have finished, see row_terms.py.
LONGEST = tl.constexpr(8)
LONG_COUNT = tl.constexpr(8)
CHUNKS = tl.constexpr(16)
ARRIVALS = tl.constexpr(32)
LONG_FIELDS = tl.constexpr(64)
# An index beyond all rows.
NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def pick(values, index):
    """``values[index]`` from a tuple, for an index that only the device knows."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def multiple(value, factor: tl.constexpr):
    """The same number, which triton may now assume to be a multiple of ``factor``."""
    if factor > 1:
        value = value // factor * factor
    return value


@triton.jit
def size(values, index, VECTOR: tl.constexpr = 1):
    """:func:`pick` from sizes, strides or addresses that :func:`layers.encoded` has encoded."""
    return multiple((pick(values, index) >> 1) - 1, VECTOR)


@triton.jit
def layer_of(entry, LAYERS: tl.constexpr):
    """The layer of an entry: the grid's second axis counts layers, or the batch of a single one."""
    if LAYERS > 1:
        layer = entry
    else:
        layer = entry * 0
    return layer


@triton.jit
def batch_of(entry, LAYERS: tl.constexpr):
    """The index of an entry within the batch, see :func:`layer_of`."""
    if LAYERS > 1:
        batch = entry.to(tl.int64) * 0
    else:
        batch = entry.to(tl.int64)
    return batch


@triton.jit
def features_of(
    addresses, strides_n, strides_d, stride_b, layer, batch,
    DTYPE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Pointer to one side's features in a layer, and their strides."""
    ptr = size(addresses, layer).to(tl.int64).to(tl.pointer_type(DTYPE))
    if VECTOR > 1:
        ptr = tl.multiple_of(ptr, 16)
    ptr += batch * multiple(stride_b, VECTOR)
    if VECTOR > 0:
        stride_d = 1
    else:
        stride_d = size(strides_d, layer)
    return ptr, size(strides_n, layer, VECTOR), stride_d


@triton.jit
def mask_of(masks, stride_b, layer, batch, placeholder, HAS_MASK: tl.constexpr):
    """Pointer to a layer's mask, or ``placeholder``, which is never read, if there is none."""
    if HAS_MASK:
        address = size(masks, layer).to(tl.int64)
        mask_ptr = address.to(tl.pointer_type(tl.uint8)) + batch * stride_b
    else:
        mask_ptr = placeholder
    return mask_ptr


@triton.jit
def split(x):
    """A float32 as the sum of two bfloat16 numbers, to 16 bits."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def square_sum(tile):
    """Sum of squares in float64, because squares may leave the range of float32."""
    wide = tile.to(tl.float64)
    return tl.sum(tl.sum(wide * wide, 1), 0)


@triton.jit
def valid_rows(mask_ptr, rows, n, HAS_MASK: tl.constexpr):
    """Which rows exist and are not masked."""
    valid = rows < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + rows, mask=valid, other=0) != 0)
    return valid


@triton.jit
def long_rows(longest_ptr):
    """The long rows of a layer, or the chunks that hold them, as scalars."""
    return (
        tl.load(longest_ptr),
        tl.load(longest_ptr + 1),
        tl.load(longest_ptr + 2),
        tl.load(longest_ptr + 3),
        tl.load(longest_ptr + 4),
        tl.load(longest_ptr + 5),
        tl.load(longest_ptr + 6),
        tl.load(longest_ptr + 7),
    )


@triton.jit
def among(rows, longest):
    """Which rows are among those of :func:`long_rows`."""
    matches = rows == longest[0]
    for slot in tl.static_range(1, LONGEST):
        matches = matches | (rows == longest[slot])
    return matches


@triton.jit
def kept_rows(mask_ptr, longest, rows, n, HAS_MASK: tl.constexpr, APART: tl.constexpr):
    """Which rows are valid and, with APART, not among the long ones."""
    valid = valid_rows(mask_ptr, rows, n, HAS_MASK)
    if APART:
        valid = valid & (among(rows, longest) == 0)
    return valid


@triton.jit
def first_kept_row(mask_ptr, longest, n, HAS_MASK: tl.constexpr, APART: tl.constexpr):
    """The first of :func:`kept_rows`, or n if there is none."""
    first = n * 0
    if HAS_MASK or APART:
        first = n
        start = n * 0
        while (start < n) & (first == n):
            rows = start + tl.arange(0, 1024)
            is_kept = kept_rows(mask_ptr, longest, rows, n, HAS_MASK, APART)
            first = tl.min(tl.where(is_kept, rows, n), 0)
            start += 1024
    return first


@triton.jit
def first_valid_row(mask_ptr, n, HAS_MASK: tl.constexpr):
    """The first of :func:`valid_rows`, or n if there is none."""
    return first_kept_row(mask_ptr, mask_ptr, n, HAS_MASK, False)


@triton.jit
def load_features(
    ptr, stride_n, stride_d, rows, valid, columns, width, mean=None, CENTER: tl.constexpr = False
):
    """A tile (rows, columns) of features, masked rows 0; with CENTER in float32, less ``mean``."""
    mask = valid[:, None] & (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    if CENTER:
        tile = tl.where(mask, tile.to(tl.float32) - mean[None, :], 0.0)
    return tile


@triton.jit
def arrive(counter_ptr, programs):
    """Whether this program is the last of ``programs`` to arrive, which sees all their stores.

    The counter is 0 before and after, so that a launch can be repeated.
    """
    # Scalar atomics and tensor stores are ordered only by a barrier (triton #7125).
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


@triton.jit
def over_programs(partial_ptr, programs, FIELDS: tl.constexpr):
    """Sums, in a fixed order, and maxima of the fields that every program has left."""
    LANES: tl.constexpr = 2048 // FIELDS
    total = tl.zeros([LANES, FIELDS], tl.float64)
    peak = tl.zeros([LANES, FIELDS], tl.float64)
    field, lanes = tl.arange(0, FIELDS), tl.arange(0, LANES)
    for first in tl.range(0, programs, LANES, loop_unroll_factor=2):
        program = first + lanes
        part = tl.load(
            partial_ptr + program[:, None] * FIELDS + field[None, :],
            mask=(program < programs)[:, None], other=0.0,
        )  # fmt: skip
        total += part
        peak = tl.maximum(peak, part)
    return tl.sum(total, 0), tl.max(peak, 0)
