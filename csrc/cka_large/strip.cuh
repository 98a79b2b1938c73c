// A strip is STRIP rows of a tile of second moments. A block of cka_large_head reads one and stores
// it as an operand of the backward pass.
#pragma once

#include "cka_large/layout.h"
#include "common/elements.cuh"
#include "common/reduce.cuh"

namespace rift {

constexpr int HEAD_THREADS = 256;
// Rows of a strip that a thread holds. The threads of a warp hold adjacent elements of the same
// rows.
constexpr int HEAD_ROWS = STRIP * MOMENT_BLOCK / HEAD_THREADS;
constexpr int STRIP_PITCH = MOMENT_BLOCK + 1;

static_assert(static_cast<int>(ROW_SUMS) >= static_cast<int>(HEAD_SUMS));

struct HeadScratch {
  float strip[STRIP * STRIP_PITCH];
  float mean_i[STRIP], mean_j[MOMENT_BLOCK];
  float own_mean_i[STRIP];  // of the side whose A or B is subtracted from C
  // For block_sums, of ROW_SUMS or fewer sums.
  double sums[ROW_SUMS * HEAD_THREADS / 32];
  int last;
};

// Sums all parts of a strip of a tile or, transposed, of the tile's transpose. Each thread receives
// HEAD_ROWS elements.
__device__ inline void read_strip(const CkaLargeArguments& arguments, TileCoord tile, int strip,
                                  bool transposed, float (&x)[HEAD_ROWS], HeadScratch& scratch) {
  const MomentsArguments moments{
      arguments.schedule, arguments.tiles, arguments.spill, nullptr, nullptr, 0};
  const int square = arguments.schedule.square_of(tile);
  const int parts = arguments.schedule.parts(square);
  const float* first = moments.part_address(tile, square, 0);
  const float* second = parts > 1 ? moments.part_address(tile, square, 1) : nullptr;
  const int side = arguments.schedule.square_side;
  const long long next = 1LL * side * side * MOMENT_TILE;
  const auto total = [&](int offset) {
    float sum = first[offset];
    for (int other = 1; other < parts; ++other) sum += second[(other - 1) * next + offset];
    return sum;
  };
  const int column = threadIdx.x % MOMENT_BLOCK, row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS;
  if (!transposed) {
#pragma unroll
    for (int i = 0; i < HEAD_ROWS; ++i) {
      x[i] = total((strip * STRIP + row + i) * MOMENT_BLOCK + column);
    }
    return;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < STRIP * MOMENT_BLOCK; i += HEAD_THREADS) {
    scratch.strip[i % STRIP * STRIP_PITCH + i / STRIP] =
        total(i / STRIP * MOMENT_BLOCK + strip * STRIP + i % STRIP);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < HEAD_ROWS; ++i) x[i] = scratch.strip[(row + i) * STRIP_PITCH + column];
}

// Stores a strip at row i and column j of both halves of a plane.
__device__ inline void store_direct(const CkaLargeArguments& arguments, unsigned short* plane,
                                    int i, int j, const float (&x)[HEAD_ROWS]) {
  const long long half = 2LL * arguments.width * arguments.width;
  const int column = threadIdx.x % MOMENT_BLOCK, row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    unsigned short* element =
        plane + static_cast<long long>(i + row + k) * arguments.width + j + column;
    element[0] = round_to_bf16(x[k]);
    element[half] = round_to_bf16(x[k] - bf16_to_float(element[0]));
  }
}

// Stores the transpose of a strip at row j and column i; scratch.strip holds the strip afterwards.
__device__ inline void store_transposed(const CkaLargeArguments& arguments, unsigned short* plane,
                                        int i, int j, const float (&x)[HEAD_ROWS],
                                        HeadScratch& scratch) {
  const long long half = 2LL * arguments.width * arguments.width;
  const int column = threadIdx.x % MOMENT_BLOCK, row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) scratch.strip[(row + k) * STRIP_PITCH + column] = x[k];
  __syncthreads();
  for (int k = threadIdx.x; k < STRIP * MOMENT_BLOCK; k += HEAD_THREADS) {
    const float value = scratch.strip[k % STRIP * STRIP_PITCH + k / STRIP];
    unsigned short* element =
        plane + static_cast<long long>(j + k / STRIP) * arguments.width + i + k % STRIP;
    element[0] = round_to_bf16(value);
    element[half] = round_to_bf16(value - bf16_to_float(element[0]));
  }
}

__device__ inline float high_half(float x) { return bf16_to_float(round_to_bf16(x)); }
__device__ inline float low_half(float x) { return bf16_to_float(round_to_bf16(x - high_half(x))); }

// The backward pass multiplies the other side's features without centering, so every row of its
// product contains the product of their means and F. This stores the part of it that comes from a
// strip, for both halves of F: for the gradient of X, from the strip in scratch.strip, along its
// rows.
__device__ inline void store_shift_x(const CkaLargeArguments& arguments, int block_j, int i,
                                     HeadScratch& scratch) {
  constexpr int THREADS_PER_ROW = HEAD_THREADS / STRIP;
  const long long half = static_cast<long long>(arguments.width / STRIP) * arguments.width;
  const int row = threadIdx.x / THREADS_PER_ROW;
  float high = 0, low = 0;
  for (int j = threadIdx.x % THREADS_PER_ROW; j < MOMENT_BLOCK; j += THREADS_PER_ROW) {
    const float x = scratch.strip[row * STRIP_PITCH + j];
    high += scratch.mean_j[j] * high_half(x);
    low += scratch.mean_j[j] * low_half(x);
  }
  high = warp_sum(high, THREADS_PER_ROW);
  low = warp_sum(low, THREADS_PER_ROW);
  if (threadIdx.x % THREADS_PER_ROW == 0) {
    float* out = arguments.shift_x + block_j * arguments.width + i + row;
    out[0] = high;
    out[half] = low;
  }
}

// The same for the gradient of Y, from the strip in registers, down its columns.
__device__ inline void store_shift_y(const CkaLargeArguments& arguments, int strip, int j,
                                     const float (&x)[HEAD_ROWS], HeadScratch& scratch) {
  const long long half = static_cast<long long>(arguments.width / STRIP) * arguments.width;
  const int column = threadIdx.x % MOMENT_BLOCK, part = threadIdx.x / MOMENT_BLOCK;
  float high = 0, low = 0;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    high += scratch.mean_i[part * HEAD_ROWS + k] * high_half(x[k]);
    low += scratch.mean_i[part * HEAD_ROWS + k] * low_half(x[k]);
  }
  __syncthreads();
  scratch.strip[part * 2 * STRIP_PITCH + column] = high;
  scratch.strip[(part * 2 + 1) * STRIP_PITCH + column] = low;
  __syncthreads();
  if (part == 0) {
    float* out = arguments.shift_y + strip * arguments.width + j + column;
    out[0] = scratch.strip[column] + scratch.strip[2 * STRIP_PITCH + column];
    out[half] = scratch.strip[STRIP_PITCH + column] + scratch.strip[3 * STRIP_PITCH + column];
  }
}

__device__ inline double sum_of_squares(const float (&x)[HEAD_ROWS]) {
  double sum = 0;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(x[k]);
  return sum;
}

}  // namespace rift
