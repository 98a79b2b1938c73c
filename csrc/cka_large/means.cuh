// The means of all columns, and the scales to unit norm, from the sums of `statistics`. This launch
// computes once what every block of the later ones needs.
//
// Memory traffic: the sums.
#pragma once

#include "cka_large/layout.h"
#include "common/reduce.cuh"

namespace rift {

constexpr int MEANS_THREADS = 256;

struct MeansScratch {
  double sums[STATISTICS * MEANS_THREADS / 32];
  double totals[STATISTICS];
};

// The sum of a column's differences from its pivot.
__device__ inline double column_sum(const CkaLargeArguments& arguments, bool is_y, int column) {
  const float* sums = arguments.sums + (is_y ? arguments.segments * arguments.width : 0) + column;
  double total = 0;
#pragma unroll 8
  for (int segment = 0; segment < arguments.segments; ++segment) {
    total += static_cast<double>(sums[segment * arguments.width]);
  }
  return total;
}

// About 1 / the norm of the centered features, which scales the elements of A, B and C to the order
// of 1.
__device__ inline float inverse_scale(double energy, double pivot_energy) {
  const double e = energy > 0 ? energy : pivot_energy;
  return e == 0 ? 1 : static_cast<float>(1 / sqrt(e));
}

__global__ void __launch_bounds__(MEANS_THREADS)
    means_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  const int index = static_cast<int>(blockIdx.x * MEANS_THREADS + threadIdx.x);
  const bool is_y = index >= arguments.width;
  const double sum = column_sum(arguments, is_y, is_y ? index - arguments.width : index);
  arguments.means[index] = static_cast<float>(arguments.pivots[index] + sum / arguments.rows);
  if (blockIdx.x > 0) return;
  auto& scratch = *reinterpret_cast<MeansScratch*>(shared_memory());
  const double total = sum_of_blocks<STATISTICS>(arguments.statistics,
                                                 arguments.statistics_blocks(), scratch.sums);
  double* totals = scratch.totals;
  if (threadIdx.x < STATISTICS) totals[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  UnitScales scales{inverse_scale(totals[ENERGY_X], totals[PIVOT_ENERGY_X]),
                    inverse_scale(totals[ENERGY_Y], totals[PIVOT_ENERGY_Y]), 0};
  if (arguments.x.width == arguments.y.width) {
    // With features of unit norm, X on Y and Y on X have the same regression coefficient.
    scales.t = static_cast<float>(totals[ENERGY_XY] * scales.x * scales.y);
  }
  *arguments.scales = scales;
  arguments.pivot_energies[0] = totals[PIVOT_ENERGY_X];
  arguments.pivot_energies[1] = totals[PIVOT_ENERGY_Y];
}

}  // namespace rift
