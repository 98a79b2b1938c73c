// Sums and energies of columns, which linear CKA in covariance form needs besides second moments.
//
// They are computed about a pivot: for each column, the median of its elements in three rows. It is
// near the mean, however far that is from 0, unless two of the three elements are far from it. If
// all rows are equal, it is the mean itself, and the energy about it is exactly 0.
//
// Memory traffic: the features once.
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

__device__ inline float median(float a, float b, float c) {
  return max(min(a, b), min(max(a, b), c));
}

// A block owns 64 columns of both sides in a segment of rows, and a warp every 8th of these rows.
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
    const int local_column = lane + 32 * k, column = block * COLUMNS + local_column;
    const int second = arguments.rows / 3, third = 2 * arguments.rows / 3;
    const auto pivot = [&](const Bf16* features, const CkaLargeSide& side) {
      return median(read(features, side, 0, column), read(features, side, second, column),
                    read(features, side, third, column));
    };
    const float pivot_x = pivot(x, arguments.x), pivot_y = pivot(y, arguments.y);
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
    for (int kind = 0; kind < KINDS; ++kind) scratch.parts[warp][kind][local_column] = kinds[kind];
  }
  __syncthreads();
  double totals[STATISTICS] = {};
  if (threadIdx.x < COLUMNS) {
    float kinds[KINDS] = {};
#pragma unroll
    for (int kind = 0; kind < KINDS; ++kind) {
      for (int other = 0; other < WARPS; ++other) {
        kinds[kind] += scratch.parts[other][kind][threadIdx.x];
      }
    }
    float* sums = arguments.sums + segment * arguments.width + block * COLUMNS + threadIdx.x;
    sums[0] = kinds[0];
    sums[arguments.segments * arguments.width] = kinds[1];
    const float inverse_count = end > begin ? 1 / static_cast<float>(end - begin) : 0;
    totals[PIVOT_ENERGY_X] = kinds[2];
    totals[PIVOT_ENERGY_Y] = kinds[3];
    totals[ENERGY_X] = kinds[2] - kinds[0] * kinds[0] * inverse_count;
    totals[ENERGY_Y] = kinds[3] - kinds[1] * kinds[1] * inverse_count;
    totals[ENERGY_XY] = kinds[4] - kinds[0] * kinds[1] * inverse_count;
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

// Sums the statistics of all blocks; every thread receives the totals.
__device__ inline void read_statistics(const CkaLargeArguments& arguments,
                                       double (&totals)[STATISTICS], double* scratch) {
  const int blocks = arguments.statistics_blocks();
#pragma unroll
  for (int kind = 0; kind < STATISTICS; ++kind) {
    totals[kind] = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
      totals[kind] += arguments.statistics[kind * blocks + i];
    }
  }
  block_sums(totals, scratch);
}

// About 1 / the norm of the centered features, which scales the elements of A, B and C to the order
// of 1.
__device__ inline float inverse_scale(double energy, double pivot_energy) {
  const double e = energy > 0 ? energy : pivot_energy;
  return e == 0 ? 1 : static_cast<float>(1 / sqrt(e));
}

__device__ inline float pivot_of(const CkaLargeArguments& arguments, bool is_y, int column) {
  return arguments.pivots[is_y * arguments.width + column];
}

// The sum of a column's differences from its pivot.
__device__ inline double column_sum(const CkaLargeArguments& arguments, bool is_y, int column) {
  const float* sums = arguments.sums + (is_y ? arguments.segments * arguments.width : 0) + column;
  double total = 0;
  for (int segment = 0; segment < arguments.segments; ++segment) {
    total += static_cast<double>(sums[segment * arguments.width]);
  }
  return total;
}

// The rows that a block of `longest` or `row_terms` owns.
struct RowRun {
  int begin, end;
};

__device__ inline RowRun row_run(const CkaLargeArguments& arguments) {
  const int length = (arguments.rows + arguments.row_blocks - 1) / arguments.row_blocks;
  const int begin = min(static_cast<int>(blockIdx.x) * length, arguments.rows);
  return {begin, min(begin + length, arguments.rows)};
}

}  // namespace rift
