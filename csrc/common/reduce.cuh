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

// Sums each of COUNT values over the lanes that differ in the bits from LOWEST to HIGHEST. Each
// step sends half of what is left, so that a lane receives the sum of one value: of the one whose
// index is, in binary, what the lane's highest bits are.
template <int LOWEST, int HIGHEST, int COUNT>
__device__ inline float scatter_sum(float (&x)[COUNT]) {
  int count = COUNT;
#pragma unroll
  for (int bit = HIGHEST; bit >= LOWEST; bit /= 2) {
    const bool upper = threadIdx.x & bit;
    count /= 2;
    if (count == 0) x[0] += __shfl_xor_sync(0xffffffffu, x[0], bit);
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      if (i >= count) break;
      const float sent = upper ? x[i] : x[i + count];
      x[i] = (upper ? x[i + count] : x[i]) + __shfl_xor_sync(0xffffffffu, sent, bit);
    }
  }
  return x[0];
}

// Sums over the block: each of the first COUNT threads receives that of its own value.
template <int COUNT>
__device__ inline double block_sum_of_thread(const double (&x)[COUNT], double* scratch) {
  const int warps = blockDim.x / 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const double sum = warp_sum(x[i]);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * COUNT + i] = sum;
  }
  __syncthreads();
  double total = 0;
  for (int warp = 0; threadIdx.x < COUNT && warp < warps; ++warp) {
    total += scratch[warp * COUNT + threadIdx.x];
  }
  return total;
}

// Sums of what blocks have left, [COUNT][blocks]: each of the first COUNT threads receives one.
template <int COUNT, typename T>
__device__ inline double sum_of_blocks(const T* parts, int blocks, double* scratch) {
  double sums[COUNT] = {};
#pragma unroll(24 / COUNT)
  for (int i = threadIdx.x; i < blocks; i += static_cast<int>(blockDim.x)) {
#pragma unroll
    for (int kind = 0; kind < COUNT; ++kind) sums[kind] += parts[kind * blocks + i];
  }
  return block_sum_of_thread(sums, scratch);
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
