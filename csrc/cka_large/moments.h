// Raw second moments of bfloat16 features.
#pragma once

#include <cuda_runtime.h>

#include "cka_large/moments_layout.h"
#include "cka_large/tensor_map.h"

namespace rift {

// The patches of X or Y as a matrix.
inline Matrix patch_matrix(const MomentsArguments& arguments, const Matrix& side, bool is_y) {
  const long long offset = is_y ? 1LL * PATCH_ROWS * arguments.patch_width : 0;
  return {arguments.patches + offset, arguments.patch_width, PATCH_ROWS, side.columns};
}

// For GPUs from sm_80 on; the schedule has single tiles. See moments_sm80.cuh.
void moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream);

// For Hopper; the schedule has squares of 2 x 2 tiles. See moments_sm90.cuh.
void moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream);

}  // namespace rift
