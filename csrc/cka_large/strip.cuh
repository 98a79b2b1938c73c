// A strip is STRIP rows of a tile of second moments. A block of cka_large_head reads one and stores
// it as an operand of the backward pass.
//
// A warp holds HEAD_ROWS rows, and each of its threads four adjacent elements of each row, which it
// loads at once.
#pragma once

#include "cka_large/head.h"
#include "common/elements.cuh"
#include "common/reduce.cuh"

namespace rift {

constexpr int HEAD_THREADS = 256;
constexpr int HEAD_WARPS = HEAD_THREADS / 32;
constexpr int HEAD_ROWS = STRIP / HEAD_WARPS;
constexpr int HEAD_VECTOR = 4;
using HeadVector = Vector<float, HEAD_VECTOR>;
// A thread's elements of a strip.
using StripElements = float[HEAD_ROWS][HEAD_VECTOR];
static_assert(32 * HEAD_VECTOR == MOMENT_BLOCK && HEAD_ROWS == HEAD_VECTOR);
static_assert(static_cast<int>(ROW_SUMS) >= static_cast<int>(HEAD_SUMS));

struct HeadScratch {
  float strip[STRIP * MOMENT_BLOCK];
  // For sums of a block, ROW_SUMS or fewer.
  double sums[ROW_SUMS * HEAD_WARPS];
  CkaLargeSums totals;
  int last;
};

// The position of an element in scratch.strip. Vectors are swizzled, so that four rows can be
// written or read as four columns without conflicts of banks.
__device__ inline int strip_position(int row, int column) {
  const int vector = column / HEAD_VECTOR ^ row / HEAD_VECTOR;
  return row * MOMENT_BLOCK + vector * HEAD_VECTOR + column % HEAD_VECTOR;
}

// This thread's first row and column of a strip and, transposed, of a quarter of its transpose.
__device__ inline int head_row() { return threadIdx.x / 32 * HEAD_ROWS; }
__device__ inline int head_column() { return threadIdx.x % 32 * HEAD_VECTOR; }
constexpr int TRANSPOSED_LANES = STRIP / HEAD_VECTOR;
constexpr int TRANSPOSED_STEP = HEAD_THREADS / TRANSPOSED_LANES;
__device__ inline int transposed_row() { return threadIdx.x / TRANSPOSED_LANES; }
__device__ inline int transposed_column() { return threadIdx.x % TRANSPOSED_LANES * HEAD_VECTOR; }

// Four adjacent means of a side.
__device__ inline void read_means(const CkaLargeArguments& arguments, bool is_y, int column,
                                  float (&means)[HEAD_VECTOR]) {
  const auto vector = *reinterpret_cast<const HeadVector*>(
      arguments.means + is_y * arguments.width + column);
#pragma unroll
  for (int e = 0; e < HEAD_VECTOR; ++e) means[e] = vector.elements[e];
}

// Four vectors of a tile, `pitch` elements apart, added up over all parts of the tile in order.
__device__ inline void read_vectors(const CkaLargeArguments& arguments, TileCoord tile, int offset,
                                    int pitch, StripElements& x) {
  const MomentsArguments moments{
      arguments.schedule, arguments.tiles, arguments.spill, nullptr, nullptr, 0};
  const int square = arguments.schedule.square_of(tile);
  const int parts = arguments.schedule.parts(square);
  const int side = arguments.schedule.square_side;
  const float* part = moments.part_address(tile, square, 0) + offset;
  const float* other = parts > 1 ? moments.part_address(tile, square, 1) + offset : nullptr;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) x[k][e] = 0;
  }
#pragma unroll 1
  for (int i = 0; i < parts; ++i) {
    HeadVector vectors[HEAD_ROWS];
#pragma unroll
    for (int k = 0; k < HEAD_ROWS; ++k) {
      vectors[k] = *reinterpret_cast<const HeadVector*>(part + k * pitch);
    }
#pragma unroll
    for (int k = 0; k < HEAD_ROWS; ++k) {
#pragma unroll
      for (int e = 0; e < HEAD_VECTOR; ++e) x[k][e] += vectors[k].elements[e];
    }
    part = other + 1LL * i * side * side * MOMENT_TILE;
  }
}

__device__ inline void store_swizzled(const StripElements& x, HeadScratch& scratch) {
  __syncthreads();
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    float* position = scratch.strip + strip_position(head_row() + k, head_column());
    *reinterpret_cast<HeadVector*>(position) = {x[k][0], x[k][1], x[k][2], x[k][3]};
  }
  __syncthreads();
}

// Reads a strip of a tile or, transposed, of the tile's transpose.
__device__ inline void read_strip(const CkaLargeArguments& arguments, TileCoord tile, int strip,
                                  bool transposed, StripElements& x, HeadScratch& scratch) {
  if (!transposed) {
    read_vectors(arguments, tile, (strip * STRIP + head_row()) * MOMENT_BLOCK + head_column(),
                 MOMENT_BLOCK, x);
    return;
  }
  StripElements columns;
  read_vectors(arguments, tile,
               transposed_row() * MOMENT_BLOCK + strip * STRIP + transposed_column(),
               TRANSPOSED_STEP * MOMENT_BLOCK, columns);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) {
      const int column = transposed_row() + k * TRANSPOSED_STEP;
      scratch.strip[strip_position(transposed_column() + e, column)] = columns[k][e];
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    const auto vector = *reinterpret_cast<const HeadVector*>(
        scratch.strip + strip_position(head_row() + k, head_column()));
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) x[k][e] = vector.elements[e];
  }
}

// Stores four adjacent elements of a plane, as two bfloat16 each.
__device__ inline void store_halves(const CkaLargeArguments& arguments, unsigned short* plane,
                                    int row, int column, const float (&x)[HEAD_VECTOR]) {
  uint32_t high[2], low[2];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    split_pair(x[2 * pair], x[2 * pair + 1], high[pair], low[pair]);
  }
  unsigned short* out = plane + static_cast<long long>(row) * arguments.width + column;
  const long long half = 2LL * arguments.width * arguments.width;
  *reinterpret_cast<Vector<uint32_t, 2>*>(out) = {high[0], high[1]};
  *reinterpret_cast<Vector<uint32_t, 2>*>(out + half) = {low[0], low[1]};
}

// Stores a strip at row i and column j of both halves of a plane.
__device__ inline void store_direct(const CkaLargeArguments& arguments, unsigned short* plane,
                                    int i, int j, const StripElements& x) {
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    store_halves(arguments, plane, i + head_row() + k, j + head_column(), x[k]);
  }
}

// Stores the transpose of a strip at row j and column i.
__device__ inline void store_transposed(const CkaLargeArguments& arguments, unsigned short* plane,
                                        int i, int j, const StripElements& x,
                                        HeadScratch& scratch) {
  store_swizzled(x, scratch);
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    const int row = transposed_row() + k * TRANSPOSED_STEP;
    float column[HEAD_VECTOR];
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) {
      column[e] = scratch.strip[strip_position(transposed_column() + e, row)];
    }
    store_halves(arguments, plane, j + row, i + transposed_column(), column);
  }
}

__device__ inline float high_half(float x) { return bf16_to_float(round_to_bf16(x)); }
__device__ inline float low_half(float x) { return bf16_to_float(round_to_bf16(x - high_half(x))); }

// The backward pass multiplies the other side's features without centering, so every row of its
// product contains the product of their means and F. This stores the part of it that comes from a
// strip, for both halves of F: for the gradient of X, along the strip's rows.
__device__ inline void store_shift_x(const CkaLargeArguments& arguments, int block_j, int i,
                                     const StripElements& x) {
  float mean_j[HEAD_VECTOR];
  read_means(arguments, true, block_j * MOMENT_BLOCK + head_column(), mean_j);
  const long long half = static_cast<long long>(arguments.width / STRIP) * arguments.width;
  float* out = arguments.shift_x + block_j * arguments.width + i + head_row();
  float sums[2 * HEAD_ROWS];
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    float high = 0, low = 0;
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) {
      high += mean_j[e] * high_half(x[k][e]);
      low += mean_j[e] * low_half(x[k][e]);
    }
    sums[2 * k] = high;
    sums[2 * k + 1] = low;
  }
  const float sum = scatter_sum<1, 16>(sums);
  const int lane = threadIdx.x % 32;
  if (lane % 4 == 0) out[lane / 8 + (lane / 4 % 2) * half] = sum;
}

// The same for the gradient of Y, down the strip's columns.
__device__ inline void store_shift_y(const CkaLargeArguments& arguments, int strip, int j,
                                     const StripElements& x, HeadScratch& scratch) {
  float mean_i[HEAD_ROWS];
  read_means(arguments, false, strip * STRIP + head_row(), mean_i);
  const long long half = static_cast<long long>(arguments.width / STRIP) * arguments.width;
  const int warp = threadIdx.x / 32;
  // [2 halves][HEAD_WARPS][MOMENT_BLOCK]
  auto* sums = reinterpret_cast<HeadVector*>(scratch.strip);
  HeadVector high = {}, low = {};
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) {
      high.elements[e] += mean_i[k] * high_half(x[k][e]);
      low.elements[e] += mean_i[k] * low_half(x[k][e]);
    }
  }
  __syncthreads();
  sums[warp * 32 + threadIdx.x % 32] = high;
  sums[(HEAD_WARPS + warp) * 32 + threadIdx.x % 32] = low;
  __syncthreads();
  // Half of the threads add up the high halves, the others the low ones.
  const int which = threadIdx.x / MOMENT_BLOCK, column = threadIdx.x % MOMENT_BLOCK;
  float total = 0;
#pragma unroll
  for (int other = 0; other < HEAD_WARPS; ++other) {
    total += scratch.strip[(which * HEAD_WARPS + other) * MOMENT_BLOCK + column];
  }
  arguments.shift_y[which * half + strip * arguments.width + j + column] = total;
}

// Each warp's sums of squares in scratch.sums, [HEAD_WARPS][HEAD_SUMS].
__device__ inline void clear_squares(HeadScratch& scratch) {
  if (threadIdx.x % 32 > 0) return;
#pragma unroll
  for (int kind = 0; kind < HEAD_SUMS; ++kind) {
    scratch.sums[threadIdx.x / 32 * HEAD_SUMS + kind] = 0;
  }
}

__device__ inline void set_square(HeadSum kind, const StripElements& x, int factor,
                                  HeadScratch& scratch) {
  double sum = 0;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) {
      sum += static_cast<double>(x[k][e]) * static_cast<double>(x[k][e]);
    }
  }
  sum = factor * warp_sum(sum);
  if (threadIdx.x % 32 == 0) scratch.sums[threadIdx.x / 32 * HEAD_SUMS + kind] = sum;
}

}  // namespace rift
