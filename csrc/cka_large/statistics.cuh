// Sums and energies of columns: what linear CKA in covariance form needs beside its second moments.
//
// All about a pivot, for each column the middle one of three rows' elements: near the mean where no two
// of the three are far from it, however far from 0, and the mean itself where all rows are alike.
//
// Bytes: the features once.
#pragma once

#include "cka_large/layout.h"
#include "common/elements.cuh"
#include "common/reduce.cuh"

namespace rift {

constexpr int STATISTICS_THREADS = 256;

struct StatisticsScratch {
  float parts[STATISTICS_THREADS / 32][5][STATISTICS_COLUMNS];
  double sums[STATISTICS * STATISTICS_THREADS / 32];
};

__device__ inline float middle(float a, float b, float c) {
  return max(min(a, b), min(max(a, b), c));
}

// A block owns 64 columns of both sides over a segment of rows; a warp every 8th row of them.
__global__ void __launch_bounds__(STATISTICS_THREADS)
    statistics_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  constexpr int WARPS = STATISTICS_THREADS / 32, COLUMNS = STATISTICS_COLUMNS, KINDS = 5;
  auto& scratch = *reinterpret_cast<StatisticsScratch*>(shared_memory());
  const int blocks = arguments.width / COLUMNS;
  const int block = blockIdx.x % blocks, segment = blockIdx.x / blocks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x < 2) arguments.counters[threadIdx.x] = 0;
  const int length = (arguments.rows + arguments.segments - 1) / arguments.segments;
  const int begin = min(segment * length, arguments.rows);
  const int end = min(begin + length, arguments.rows);
  const auto* x = static_cast<const Bf16*>(arguments.x.features);
  const auto* y = static_cast<const Bf16*>(arguments.y.features);
  const auto read = [&](const Bf16* features, const CkaLargeSide& side, int row, int column) {
    return column < side.width ? to_float(features[row * side.stride + column]) : 0;
  };
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int within = lane + 32 * k, column = block * COLUMNS + within;
    const int second = arguments.rows / 3, third = 2 * arguments.rows / 3;
    const float pivot_x =
        middle(read(x, arguments.x, 0, column), read(x, arguments.x, second, column),
               read(x, arguments.x, third, column));
    const float pivot_y =
        middle(read(y, arguments.y, 0, column), read(y, arguments.y, second, column),
               read(y, arguments.y, third, column));
    if (segment == 0 && warp == 0) {
      arguments.pivots[column] = pivot_x;
      arguments.pivots[arguments.width + column] = pivot_y;
    }
    float kinds[KINDS] = {};
#pragma unroll 4
    for (int row = begin + warp; row < end; row += WARPS) {
      const float a = read(x, arguments.x, row, column) - pivot_x;
      const float b = read(y, arguments.y, row, column) - pivot_y;
      kinds[0] += a;
      kinds[1] += b;
      kinds[2] += a * a;
      kinds[3] += b * b;
      kinds[4] += a * b;
    }
#pragma unroll
    for (int kind = 0; kind < KINDS; ++kind) scratch.parts[warp][kind][within] = kinds[kind];
  }
  __syncthreads();
  double totals[STATISTICS] = {};
  if (threadIdx.x < COLUMNS) {
    float kinds[KINDS] = {};
#pragma unroll
    for (int kind = 0; kind < KINDS; ++kind) {
      for (int other = 0; other < WARPS; ++other)
        kinds[kind] += scratch.parts[other][kind][threadIdx.x];
    }
    float* sums = arguments.sums + segment * arguments.width + block * COLUMNS + threadIdx.x;
    sums[0] = kinds[0];
    sums[arguments.segments * arguments.width] = kinds[1];
    const float share = end > begin ? 1 / static_cast<float>(end - begin) : 0;
    totals[PIVOT_X] = kinds[2];
    totals[PIVOT_Y] = kinds[3];
    totals[ENERGY_X] = kinds[2] - kinds[0] * kinds[0] * share;
    totals[ENERGY_Y] = kinds[3] - kinds[1] * kinds[1] * share;
    totals[ENERGY_XY] = kinds[4] - kinds[0] * kinds[1] * share;
  }
  block_sums(totals, scratch.sums);
  if (threadIdx.x < STATISTICS) {
#pragma unroll
    for (int kind = 0; kind < STATISTICS; ++kind) {
      if (threadIdx.x == static_cast<unsigned>(kind)) {
        arguments.statistics[kind * gridDim.x + blockIdx.x] = static_cast<float>(totals[kind]);
      }
    }
  }
}

// The statistics over all blocks, for every thread of a block.
__device__ inline void read_statistics(const CkaLargeArguments& arguments,
                                       double (&totals)[STATISTICS], double* scratch) {
  const int programs = arguments.statistics_programs();
#pragma unroll
  for (int kind = 0; kind < STATISTICS; ++kind) {
    totals[kind] = 0;
    for (int i = threadIdx.x; i < programs; i += blockDim.x) {
      totals[kind] += arguments.statistics[kind * programs + i];
    }
  }
  block_sums(totals, scratch);
}

// About 1 / the norm of the centered features, so that all blocks are of the size of 1.
__device__ inline float inverse_scale(double energy, double pivot) {
  const double e = energy > 0 ? energy : pivot;
  return e == 0 ? 1 : static_cast<float>(1 / sqrt(e));
}

__device__ inline float pivot_of(const CkaLargeArguments& arguments, bool is_y, int column) {
  return arguments.pivots[is_y * arguments.width + column];
}

// About the pivot.
__device__ inline double column_sum(const CkaLargeArguments& arguments, bool is_y, int column) {
  const float* sums = arguments.sums + (is_y ? arguments.segments * arguments.width : 0) + column;
  double total = 0;
  for (int segment = 0; segment < arguments.segments; ++segment) {
    total += static_cast<double>(sums[segment * arguments.width]);
  }
  return total;
}

// The rows of a block, where these are dealt out.
struct RowRun {
  int begin, end;
};

__device__ inline RowRun row_run(const CkaLargeArguments& arguments) {
  const int length = (arguments.rows + arguments.row_programs - 1) / arguments.row_programs;
  const int begin = min(static_cast<int>(blockIdx.x) * length, arguments.rows);
  return {begin, min(begin + length, arguments.rows)};
}

}  // namespace rift
