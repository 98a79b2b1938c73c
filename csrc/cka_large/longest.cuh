// The longest rows, which debiased CKA treats separately.
//
// H(X, Y) excludes the product of a row with itself. Computed from moments it is therefore a
// difference, in which nearly all digits cancel if a row is far longer than the others. So up to
// MAX_LONG_ROWS long rows, S, never enter the sums: moments and means are those of the other rows,
// R, and the terms of S are computed from products of pairs of rows. All rows are centered about
// the means of R, which is allowed because H is the same about any center.
//
// Most features have no long rows. So this launch also makes what row_terms would make without any,
// in the same pass (row_pass.cuh).
//
// Memory traffic: that of the pass.
#pragma once

#include "cka_large/means.cuh"
#include "cka_large/row_pass.cuh"

namespace rift {

// Sort key of a long row: larger shares of the total energy rank higher, then smaller indices. 0:
// the row is not long.
using LengthKey = unsigned long long;

__device__ inline LengthKey length_key(float share, int row, int rows) {
  // With MAX_LONG_ROWS rows or fewer, R may be empty.
  const bool is_long = rows < ALWAYS_LONG_BELOW || share * static_cast<float>(rows) > LONG_SHARE;
  if (!is_long || !(share > 0)) return 0;
  return LengthKey{float_to_bits(share)} << 32 | (0xFFFFFFFFu - static_cast<unsigned>(row));
}
__device__ inline int key_row(LengthKey key) {
  return key ? static_cast<int>(0xFFFFFFFFu - static_cast<unsigned>(key)) : -1;
}

struct LongestScratch {
  RowScratch rows;
  LengthKey keys[ROW_WARPS];
  int last;
};

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
#pragma unroll
  for (int warp = 0; warp < ROW_WARPS; ++warp) key = scratch[warp] > key ? scratch[warp] : key;
  return key;
}

// Finds the MAX_LONG_ROWS largest of the keys [begin, end), using all threads of a block. Thread 0
// calls `store` for each of them, in descending order.
template <typename Read, typename Store>
__device__ inline void find_longest(int begin, int end, Read read, Store store,
                                    LengthKey* scratch) {
  LengthKey previous = ~LengthKey{0};
#pragma unroll 1
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    // After the last of them, the others are 0.
    if (previous > 0) {
      LengthKey largest = 0;
      for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += ROW_THREADS) {
        const LengthKey key = read(i);
        if (key < previous && key > largest) largest = key;
      }
      previous = block_largest(largest, scratch);
    }
    if (threadIdx.x == 0) store(s, previous);
  }
}

// Replaces the means by those of R, unless R is empty, and copies the long rows.
__device__ inline void leave_out(const CkaLargeArguments& arguments, const LongRows& long_rows) {
  const int width = arguments.width, remaining = arguments.rows - long_rows.count;
  for (int i = threadIdx.x; i < 2 * width; i += ROW_THREADS) {
    const bool is_y = i >= width;
    const CkaLargeSide& side = is_y ? arguments.y : arguments.x;
    const int column = is_y ? i - width : i;
    const auto* features = static_cast<const Bf16*>(side.features) + column;
    const float pivot = arguments.pivots[i];
    double total = column_sum(arguments, is_y, column);
#pragma unroll
    for (int s = 0; s < MAX_LONG_ROWS; ++s) {
      const bool exists = s < long_rows.count && column < side.width;
      const Bf16 x = exists ? features[long_rows.rows[s] * side.stride] : Bf16{0};
      if (exists) total -= static_cast<double>(to_float(x) - pivot);
      arguments.long_features[(is_y * MAX_LONG_ROWS + s) * width + column] = x.bits;
    }
    if (remaining > 0 && column < side.width) {
      arguments.means[i] = static_cast<float>(pivot + total / remaining);
    }
  }
}

// A block owns a run of rows and finds its longest rows. The last block to finish compares them.
__global__ void __launch_bounds__(ROW_THREADS)
    longest_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  auto& scratch = *reinterpret_cast<LongestScratch*>(shared_memory());
  const LongRows none = no_long_rows();
  const RowPass<false> pass(arguments, none, scratch.rows);
  pass.execute();
  LengthKey* candidates = arguments.candidates;
  find_longest(
      pass.run.begin, pass.run.end,
      [&](int row) {
        const RowTerms terms = arguments.row_terms[row];
        return length_key(max(terms.energies[0], terms.energies[1]), row, arguments.rows);
      },
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
      [&](int s, LengthKey key) { arguments.long_rows[s] = key_row(key); }, scratch.keys);
  __syncthreads();
  const LongRows long_rows = read_long_rows(arguments);
  if (long_rows.count > 0) leave_out(arguments, long_rows);
}

}  // namespace rift
