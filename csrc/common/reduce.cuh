// Sums over the threads of a warp or block, always in the same order.
#pragma once

#include "common/primitives.cuh"

namespace rift {

// Sum over the lanes of a warp, or over `width` adjacent lanes; every lane receives it.
template <typename T>
__device__ inline T warp_sum(T x, int width = 32) {
  for (int lane = width / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// Sums over the block; every thread receives them.
template <int COUNT>
__device__ inline void block_sums(double (&x)[COUNT], double* scratch) {
  const int warps = blockDim.x / 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const double sum = warp_sum(x[i]);
    if (threadIdx.x % 32 == 0) scratch[i * warps + threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    x[i] = 0;
    for (int warp = 0; warp < warps; ++warp) x[i] += scratch[i * warps + warp];
  }
}

}  // namespace rift
