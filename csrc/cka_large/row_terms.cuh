// What long rows change (longest.cuh): the terms of all rows, which are about the means of the
// others, and the moments, which need patches: the chunks of long rows without these rows. Without
// long rows, this launch does nothing.
//
// Memory traffic: the features twice; 80 bytes for each row; the patches.
#pragma once

#include "cka_large/longest.cuh"

namespace rift {

// Copies 128 columns of the chunk of a long row and replaces the long rows in it by 0.
__device__ inline void make_patch(const CkaLargeArguments& arguments, const LongRows& long_rows,
                                  const RowStream& stream, int piece) {
  constexpr int VECTORS = MOMENT_BLOCK / FEATURE_VECTOR, STEP = ROW_THREADS / VECTORS;
  static_assert(STEP * ROWS_AT_ONCE == MOMENT_CHUNK);
  const int blocks = arguments.width / MOMENT_BLOCK;
  const int slot = piece / (2 * blocks), is_y = piece / blocks % 2;
  const int long_row = arguments.long_rows[slot];
  if (long_row < 0) return;
  const CkaLargeSide& side = is_y ? arguments.y : arguments.x;
  const int thread = threadIdx.x, patch_row = thread / VECTORS;
  const int column = piece % blocks * MOMENT_BLOCK + thread % VECTORS * FEATURE_VECTOR;
  const FeatureColumns columns = feature_columns(side, column);
#pragma unroll
  for (int i = 0; i < ROWS_AT_ONCE; ++i) {
    const int row = long_row / MOMENT_CHUNK * MOMENT_CHUNK + patch_row + i * STEP;
    const bool included = row < arguments.rows && !long_rows.has(row);
    stream.fetch(0, i, 0, columns, row * side.stride, included);
  }
  commit_copies();
  wait_copies<0>();
  const long long first = (is_y * MAX_LONG_ROWS + slot) * MOMENT_CHUNK + patch_row;
  unsigned short* patch = arguments.patches + first * arguments.width + column;
#pragma unroll
  for (int i = 0; i < ROWS_AT_ONCE; ++i) {
    *reinterpret_cast<FeatureVector*>(patch + i * STEP * arguments.width) = *stream.vector(0, i, 0);
  }
}

// A block owns a run of rows, and some pieces of patches.
__global__ void __launch_bounds__(ROW_THREADS)
    row_terms_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  const LongRows long_rows = read_long_rows(arguments);
  if (long_rows.count == 0) return;
  auto& scratch = *reinterpret_cast<RowScratch*>(shared_memory());
  const RowPass<true> pass(arguments, long_rows, scratch);
  for (int piece = blockIdx.x; piece < arguments.patch_pieces(); piece += arguments.row_blocks) {
    make_patch(arguments, long_rows, pass.stream, piece);
  }
  pass.execute();
}

}  // namespace rift
