// Sums and energies of columns, and energies of rows: what linear CKA in covariance form needs beside
// its second moments.
//
// Bytes: the features once for the columns; debiased, twice more for the rows.
#pragma once

#include "covariance_layout.h"
#include "reduce.cuh"
#include "types.cuh"

namespace rift {

constexpr int STATISTICS_THREADS = 256;

struct StatisticsScratch {
  float parts[STATISTICS_THREADS / 32][7][STATISTICS_COLUMNS];
  double sums[STATISTICS * STATISTICS_THREADS / 32];
};

// A block owns 64 columns of both sides over a segment of rows; a warp every 8th row of them.
__global__ void __launch_bounds__(STATISTICS_THREADS)
    statistics_kernel(const __grid_constant__ CovarianceArguments arguments) {
  constexpr int WARPS = STATISTICS_THREADS / 32, COLUMNS = STATISTICS_COLUMNS, KINDS = 7;
  auto& scratch = *reinterpret_cast<StatisticsScratch*>(shared_memory());
  const int blocks = arguments.width / COLUMNS;
  const int block = blockIdx.x % blocks, segment = blockIdx.x / blocks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) *arguments.counter = 0;
  const int length = (arguments.rows + arguments.segments - 1) / arguments.segments;
  const int begin = min(segment * length, arguments.rows);
  const int end = min(begin + length, arguments.rows);
  const auto* x = static_cast<const Bf16*>(arguments.x.features);
  const auto* y = static_cast<const Bf16*>(arguments.y.features);
  const auto read = [&](const Bf16* features, const CovarianceSide& side, int row, int column) {
    return column < side.width ? to_float(features[row * side.stride + column]) : 0;
  };
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int within = lane + 32 * k, column = block * COLUMNS + within;
    const float pivot_x = read(x, arguments.x, 0, column);
    const float pivot_y = read(y, arguments.y, 0, column);
    float kinds[KINDS] = {};
#pragma unroll 4
    for (int row = begin + warp; row < end; row += WARPS) {
      const float a = read(x, arguments.x, row, column), b = read(y, arguments.y, row, column);
      const float from_x = a - pivot_x, from_y = b - pivot_y;
      kinds[0] += a;
      kinds[1] += b;
      kinds[2] += from_x;
      kinds[3] += from_y;
      kinds[4] += from_x * from_x;
      kinds[5] += from_y * from_y;
      kinds[6] += from_x * from_y;
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
      for (int other = 0; other < WARPS; ++other) kinds[kind] += scratch.parts[other][kind][threadIdx.x];
    }
    float* sums = arguments.sums + segment * arguments.width + block * COLUMNS + threadIdx.x;
    sums[0] = kinds[0];
    sums[arguments.segments * arguments.width] = kinds[1];
    const float share = end > begin ? 1 / static_cast<float>(end - begin) : 0;
    totals[PIVOT_X] = kinds[4];
    totals[PIVOT_Y] = kinds[5];
    totals[ENERGY_X] = kinds[4] - kinds[2] * kinds[2] * share;
    totals[ENERGY_Y] = kinds[5] - kinds[3] * kinds[3] * share;
    totals[ENERGY_XY] = kinds[6] - kinds[2] * kinds[3] * share;
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
__device__ inline void read_statistics(const CovarianceArguments& arguments,
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

__device__ inline float column_mean(const CovarianceArguments& arguments, bool is_y, int column) {
  const float* sums = arguments.sums + (is_y ? arguments.segments * arguments.width : 0) + column;
  float total = 0;
  for (int segment = 0; segment < arguments.segments; ++segment) {
    total += sums[segment * arguments.width];
  }
  return total / static_cast<float>(arguments.rows);
}

// Of rows_kernel: sums over warps, and the means of both sides.
RIFT_BOTH constexpr int rows_shared(int width) {
  return ROW_SUMS * STATISTICS_THREADS / 32 * 8 + 2 * width * 4;
}

// A block owns a run of rows: their energies, the sums of these, and columns weighted with them.
__global__ void __launch_bounds__(STATISTICS_THREADS)
    rows_kernel(const __grid_constant__ CovarianceArguments arguments) {
  constexpr int WARPS = STATISTICS_THREADS / 32;
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  // The means of X and of Y.
  auto* means = reinterpret_cast<float*>(scratch + ROW_SUMS * WARPS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = arguments.width;
  const int length = (arguments.rows + arguments.row_programs - 1) / arguments.row_programs;
  const int begin = min(static_cast<int>(blockIdx.x) * length, arguments.rows);
  const int end = min(begin + length, arguments.rows);
  for (int i = threadIdx.x; i < 2 * width; i += blockDim.x) {
    means[i] = column_mean(arguments, i >= width, i >= width ? i - width : i);
  }
  double statistics[STATISTICS];
  read_statistics(arguments, statistics, scratch);
  const float inverse[2] = {inverse_scale(statistics[ENERGY_X], statistics[PIVOT_X]),
                            inverse_scale(statistics[ENERGY_Y], statistics[PIVOT_Y])};
  const CovarianceSide sides[2] = {arguments.x, arguments.y};
  double totals[ROW_SUMS] = {};
  for (int row = begin + warp; row < end; row += WARPS) {
    float energy[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto* features = static_cast<const Bf16*>(sides[side].features) + row * sides[side].stride;
      float sum = 0;
      for (int column = lane; column < sides[side].width; column += 32) {
        const float x = (to_float(features[column]) - means[side * width + column]) * inverse[side];
        sum += x * x;
      }
      energy[side] = lane_sum(sum);
      if (lane == 0) arguments.energies[side * arguments.rows + row] = energy[side];
    }
    if (lane == 0) {
      const double r = energy[0], q = energy[1];
      totals[SUM_R] += r;
      totals[SUM_Q] += q;
      totals[SQUARE_R] += r * r;
      totals[SQUARE_Q] += q * q;
      totals[PRODUCT_RQ] += r * q;
    }
  }
  block_sums(totals, scratch);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int kind = 0; kind < ROW_SUMS; ++kind) {
      arguments.row_sums[blockIdx.x * ROW_SUMS + kind] = totals[kind];
    }
  }
  // block_sums has met since the energies were stored.
  float* weighted = arguments.weighted + static_cast<long long>(blockIdx.x) * 4 * width;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const auto* features = static_cast<const Bf16*>(sides[side].features);
    const float* own = arguments.energies + side * arguments.rows;
    const float* other = arguments.energies + (1 - side) * arguments.rows;
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
      float by_own = 0, by_other = 0;
      for (int row = begin; row < end && column < sides[side].width; ++row) {
        const float x =
            to_float(features[row * sides[side].stride + column]) - means[side * width + column];
        by_own += own[row] * x;
        by_other += other[row] * x;
      }
      weighted[2 * side * width + column] = by_own;
      weighted[(2 * side + 1) * width + column] = by_other;
    }
  }
}

}  // namespace rift
