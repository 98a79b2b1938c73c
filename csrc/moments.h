// Raw second moments of bfloat16 features: on any GPU from sm_80 on, and on Hopper.
#pragma once

#include <cuda_runtime.h>

#include "moments_layout.h"
#include "tensor_map.h"

namespace rift {

// A schedule of single tiles; see moments_sm80.cuh.
void moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream);

// A schedule of pairs; see moments_sm90.cuh.
void moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream);

}  // namespace rift
