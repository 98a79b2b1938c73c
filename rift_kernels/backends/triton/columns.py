"""Column statistics: sums of both sides' columns, their energies, and how much the sides share.

Column programs of raw_moments_kernel write them, later kernels read them.

Bytes: X and Y once; a few numbers per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import first_kept_row, kept_rows, load_features

# Fields of a layer's statistics, one number per column program. PIVOT is the energy about the first
# row, ENERGY that about the mean of a segment of rows.
COUNT = tl.constexpr(0)
PIVOT_X = tl.constexpr(1)
PIVOT_Y = tl.constexpr(2)
ENERGY_X = tl.constexpr(3)
ENERGY_Y = tl.constexpr(4)
ENERGY_XY = tl.constexpr(5)
STATISTICS = tl.constexpr(6)


@triton.jit
def column_statistics(
    x_ptr, y_ptr, mask_ptr, n, d1, d2, stride_xn, stride_xd, stride_yn, stride_yd,
    longest, sums_ptr, statistics_ptr, program, segments, blocks, width,
    HAS_MASK: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums and energies of one block of columns over one segment of rows.

    Energies about the first row of all are exactly 0 for constant features. Energies about the
    segment's mean tell how large the features are. Masked rows and long rows do not count.
    """
    block, segment = program % blocks, program // blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    first = first_kept_row(mask_ptr, longest, n, HAS_MASK, APART)
    pivot_x = tl.load(
        x_ptr + first.to(tl.int64) * stride_xn + columns.to(tl.int64) * stride_xd,
        mask=(columns < d1) & (first < n), other=0.0,
    ).to(tl.float32)  # fmt: skip
    pivot_y = tl.load(
        y_ptr + first.to(tl.int64) * stride_yn + columns.to(tl.int64) * stride_yd,
        mask=(columns < d2) & (first < n), other=0.0,
    ).to(tl.float32)  # fmt: skip
    # Enough bytes on their way. Wider features and addresses of single elements take registers.
    UNROLL: tl.constexpr = 2 if VECTOR == 8 else 1
    # Every thread adds up its own rows. Adding up those of all threads in each step would take
    # longer than the loads.
    zero = tl.zeros([BLOCK_R, BLOCK], tl.float32)
    sums_x, sums_y, squares_x, squares_y, products = zero, zero, zero, zero, zero
    count = tl.zeros([BLOCK_R], tl.float32)
    length = tl.cdiv(tl.cdiv(n, segments), BLOCK_R) * BLOCK_R
    end = tl.minimum(n, (segment + 1) * length)
    for start in tl.range(segment * length, end, BLOCK_R, loop_unroll_factor=UNROLL):
        rows = start + tl.arange(0, BLOCK_R)
        valid = kept_rows(mask_ptr, longest, rows, n, HAS_MASK, APART)
        x = load_features(x_ptr, stride_xn, stride_xd, rows, valid, columns, d1)
        y = load_features(y_ptr, stride_yn, stride_yd, rows, valid, columns, d2)
        x, y = x.to(tl.float32), y.to(tl.float32)
        sums_x += x
        sums_y += y
        x = tl.where(valid[:, None], x - pivot_x[None, :], 0.0)
        y = tl.where(valid[:, None], y - pivot_y[None, :], 0.0)
        squares_x += x * x
        squares_y += y * y
        products += x * y
        count += valid.to(tl.float32)
    sum_x, sum_y = tl.sum(sums_x, 0), tl.sum(sums_y, 0)
    square_x, square_y = tl.sum(squares_x, 0), tl.sum(squares_y, 0)
    product, segment_rows = tl.sum(products, 0), tl.sum(count, 0)
    tl.store(sums_ptr + segment * width + columns, sum_x, mask=columns < width)
    sums_ptr += segments * width
    tl.store(sums_ptr + segment * width + columns, sum_y, mask=columns < width)
    shifted_x, shifted_y = sum_x - segment_rows * pivot_x, sum_y - segment_rows * pivot_y
    share = tl.where(segment_rows > 0, 1 / segment_rows, 0.0)
    programs = blocks * segments
    out = statistics_ptr + program
    tl.store(out + COUNT * programs, tl.where(block == 0, segment_rows, 0.0))
    tl.store(out + PIVOT_X * programs, tl.sum(square_x, 0))
    tl.store(out + PIVOT_Y * programs, tl.sum(square_y, 0))
    tl.store(out + ENERGY_X * programs, tl.sum(square_x - shifted_x * shifted_x * share, 0))
    tl.store(out + ENERGY_Y * programs, tl.sum(square_y - shifted_y * shifted_y * share, 0))
    tl.store(out + ENERGY_XY * programs, tl.sum(product - shifted_x * shifted_y * share, 0))


@triton.jit
def statistic(statistics_ptr, field, programs):
    """The sum of one field over the column programs, in float64."""
    lanes = tl.arange(0, 256)
    total = tl.zeros([256], tl.float64)
    for first in range(0, programs, 256):
        i = first + lanes
        parts = tl.load(statistics_ptr + field * programs + i, mask=i < programs, other=0.0)
        total += parts.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def inverse_scale(statistics_ptr, pivot_field, field, programs):
    """Roughly one over the norm of the centered features, to bring all blocks to the order of 1."""
    energy = statistic(statistics_ptr, field, programs)
    pivot = statistic(statistics_ptr, pivot_field, programs)
    energy = tl.where(energy > 0, energy, pivot)
    return tl.where(energy == 0, 1.0, 1.0 / tl.sqrt(energy)).to(tl.float32)


@triton.jit
def column_mean(sums_ptr, columns, segments, stride, count, mask, BLOCK: tl.constexpr):
    """Means of some columns from the segments' sums, added in order."""
    total = tl.zeros([BLOCK], tl.float32)
    for segment in range(segments):
        total += tl.load(sums_ptr + segment * stride + columns, mask=mask, other=0.0)
    return total / count
