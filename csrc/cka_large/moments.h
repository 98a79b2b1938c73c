// Raw second moments of bfloat16 features: on any GPU from sm_80 on, and on Hopper.
#pragma once

#include <cuda_runtime.h>

#include "cka_large/moments_layout.h"
#include "cka_large/tensor_map.h"

namespace rift {

// The patches of a side as a matrix.
inline Matrix patch_matrix(const MomentsArguments& arguments, const Matrix& side, bool is_y) {
  const long long before = is_y ? 1LL * PATCH_ROWS * arguments.patch_width : 0;
  return {arguments.patches + before, arguments.patch_width, PATCH_ROWS, side.columns};
}

// A schedule of single tiles; see moments_sm80.cuh.
void moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream);

// A schedule of pairs; see moments_sm90.cuh.
void moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream);

}  // namespace rift
