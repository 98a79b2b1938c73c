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
                                  int index) {
  const int blocks = arguments.width / MOMENT_BLOCK;
  const int slot = index / (2 * blocks), is_y = index / blocks % 2;
  const CkaLargeSide& side = is_y ? arguments.y : arguments.x;
  const auto* features = static_cast<const Bf16*>(side.features);
  const long long offset = is_y ? 1LL * PATCH_ROWS * arguments.width : 0;
  unsigned short* patches = arguments.patches + offset;
  const int long_row = arguments.long_rows[slot];
  if (long_row < 0) return;
  const int first = long_row / MOMENT_CHUNK * MOMENT_CHUNK;
  const int column = index % blocks * MOMENT_BLOCK + static_cast<int>(threadIdx.x) % MOMENT_BLOCK;
#pragma unroll 4
  for (int i = threadIdx.x / MOMENT_BLOCK; i < MOMENT_CHUNK; i += blockDim.x / MOMENT_BLOCK) {
    const int row = first + i;
    const bool included = row < arguments.rows && column < side.width && !long_rows.has(row);
    patches[static_cast<long long>(slot * MOMENT_CHUNK + i) * arguments.width + column] =
        included ? features[row * side.stride + column].bits : uint16_t{0};
  }
}

// A block owns a run of rows, or some columns of a patch.
__global__ void __launch_bounds__(ROW_THREADS)
    row_terms_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  const LongRows long_rows = read_long_rows(arguments);
  if (long_rows.count == 0) return;
  if (static_cast<int>(blockIdx.x) >= arguments.row_blocks) {
    make_patch(arguments, long_rows, static_cast<int>(blockIdx.x) - arguments.row_blocks);
    return;
  }
  auto& scratch = *reinterpret_cast<RowScratch*>(shared_memory());
  RowPass<true>(arguments, long_rows, scratch).execute();
}

}  // namespace rift
