// The longest rows, which debiased CKA treats separately.
//
// H(X, Y) excludes the product of a row with itself. Computed from moments it is therefore a
// difference, in which nearly all digits cancel if a row is far longer than the others. So up to
// MAX_LONG_ROWS long rows, S, never enter the sums: moments and means are those of the other rows,
// R, and the terms of S are computed from products of pairs of rows. All rows are centered about
// the means of R, which is allowed because H is the same about any center.
//
// Memory traffic: the features once; 4 bytes for each row.
#pragma once

#include "cka_large/layout.h"
#include "cka_large/statistics.cuh"

namespace rift {

// The rows of S, longest first, in the registers of every thread.
struct LongRows {
  int rows[MAX_LONG_ROWS];
  int count;

  __device__ bool has(int row) const {
    bool equal = false;
#pragma unroll
    for (int s = 0; s < MAX_LONG_ROWS; ++s) equal = equal || rows[s] == row;
    return equal;
  }
};

__device__ inline LongRows read_long_rows(const CkaLargeArguments& arguments) {
  LongRows long_rows;
  long_rows.count = 0;
#pragma unroll
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    long_rows.rows[s] = arguments.debiased ? arguments.long_rows[s] : -1;
    long_rows.count += long_rows.rows[s] >= 0;
  }
  return long_rows;
}

// The number of rows of R.
__device__ inline int remaining_rows(const CkaLargeArguments& arguments,
                                     const LongRows& long_rows) {
  return arguments.rows - long_rows.count;
}

// The mean of a column over R, or over all rows if R is empty.
__device__ inline float column_mean(const CkaLargeArguments& arguments, const LongRows& long_rows,
                                    bool is_y, int column) {
  double total = column_sum(arguments, is_y, column);
  const float pivot = pivot_of(arguments, is_y, column);
  const int remaining = remaining_rows(arguments, long_rows);
  const CkaLargeSide& side = is_y ? arguments.y : arguments.x;
  if (long_rows.count == 0 || remaining == 0 || column >= side.width) {
    return static_cast<float>(pivot + total / arguments.rows);
  }
  const auto* features = static_cast<const Bf16*>(side.features) + column;
#pragma unroll
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    if (s < long_rows.count) {
      total -= static_cast<double>(to_float(features[long_rows.rows[s] * side.stride]) - pivot);
    }
  }
  return static_cast<float>(pivot + total / remaining);
}

// Sort key of a row: larger shares of the total energy rank higher, then smaller indices. 0: no
// row.
using LengthKey = unsigned long long;

__device__ inline LengthKey length_key(float share, int row) {
  if (!(share > 0)) return 0;
  return LengthKey{float_to_bits(share)} << 32 | (0xFFFFFFFFu - static_cast<unsigned>(row));
}
__device__ inline int key_row(LengthKey key) {
  return key ? static_cast<int>(0xFFFFFFFFu - static_cast<unsigned>(key)) : -1;
}
__device__ inline float key_share(LengthKey key) {
  return bits_to_float(static_cast<uint32_t>(key >> 32));
}

constexpr int LONGEST_WARPS = STATISTICS_THREADS / 32;

struct LongestScratch {
  double sums[STATISTICS * LONGEST_WARPS];
  LengthKey keys[LONGEST_WARPS];
  int last;
};

RIFT_HOST_DEVICE constexpr int longest_shared(int width) {
  return static_cast<int>(sizeof(LongestScratch)) + 2 * width * 4;
}

// The largest key of all threads of a block; every thread receives it.
__device__ inline LengthKey block_largest(LengthKey key, LengthKey* scratch) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const unsigned high = __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned>(key >> 32), lane);
    const unsigned low = __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned>(key), lane);
    const LengthKey other = LengthKey{high} << 32 | low;
    key = other > key ? other : key;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = key;
  __syncthreads();
  for (int warp = 0; warp < LONGEST_WARPS; ++warp) key = scratch[warp] > key ? scratch[warp] : key;
  return key;
}

// Finds the MAX_LONG_ROWS largest of the keys [begin, end), using all threads of a block. Thread 0
// calls `store` for each of them, in descending order.
template <typename Read, typename Store>
__device__ inline void find_longest(int begin, int end, Read read, Store store,
                                    LengthKey* scratch) {
  LengthKey previous = ~LengthKey{0};
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    LengthKey largest = 0;
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += blockDim.x) {
      const LengthKey key = read(i);
      if (key < previous && key > largest) largest = key;
    }
    previous = block_largest(largest, scratch);
    if (threadIdx.x == 0) store(s, previous);
  }
}

// A block owns a run of rows and finds its longest rows. The last block to finish compares them.
__global__ void __launch_bounds__(STATISTICS_THREADS)
    longest_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  auto& scratch = *reinterpret_cast<LongestScratch*>(shared_memory());
  auto* means = reinterpret_cast<float*>(&scratch + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = arguments.width;
  const RowRun run = row_run(arguments);
  for (int i = threadIdx.x; i < 2 * width; i += blockDim.x) {
    const int column = i >= width ? i - width : i;
    const double sum = column_sum(arguments, i >= width, column);
    means[i] = static_cast<float>(pivot_of(arguments, i >= width, column) + sum / arguments.rows);
  }
  double statistics[STATISTICS];
  read_statistics(arguments, statistics, scratch.sums);
  const float inverse[2] = {inverse_scale(statistics[ENERGY_X], statistics[PIVOT_ENERGY_X]),
                            inverse_scale(statistics[ENERGY_Y], statistics[PIVOT_ENERGY_Y])};
  const CkaLargeSide sides[2] = {arguments.x, arguments.y};
  for (int row = run.begin + warp; row < run.end; row += LONGEST_WARPS) {
    float share = 0;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto* features =
          static_cast<const Bf16*>(sides[side].features) + row * sides[side].stride;
      float sum = 0;
      for (int column = lane; column < sides[side].width; column += 32) {
        const float x = (to_float(features[column]) - means[side * width + column]) * inverse[side];
        sum += x * x;
      }
      share = max(share, warp_sum(sum));
    }
    if (lane == 0) arguments.shares[row] = share;
  }
  __syncthreads();
  LengthKey* candidates = arguments.candidates;
  find_longest(
      run.begin, run.end, [&](int row) { return length_key(arguments.shares[row], row); },
      [&](int s, LengthKey key) { candidates[blockIdx.x * MAX_LONG_ROWS + s] = key; },
      scratch.keys);
  // Thread 0 wrote the candidates itself, so its fence covers them.
  if (threadIdx.x == 0) {
    __threadfence();
    scratch.last = atomicAdd(arguments.counters + 1, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!scratch.last) return;
  find_longest(
      0, arguments.row_blocks * MAX_LONG_ROWS, [&](int i) { return candidates[i]; },
      [&](int s, LengthKey key) {
        // With MAX_LONG_ROWS rows or fewer, R may be empty.
        const float ratio = key_share(key) * static_cast<float>(arguments.rows);
        const bool is_long = arguments.rows < ALWAYS_LONG_BELOW || ratio > LONG_SHARE;
        arguments.long_rows[s] = is_long ? key_row(key) : -1;
      },
      scratch.keys);
}

}  // namespace rift
