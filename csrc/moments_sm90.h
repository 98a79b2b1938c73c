// Raw second moments of bfloat16 features on Hopper; see moments_sm90.cuh.
#pragma once

#include <cuda_runtime.h>

#include "moments_layout.h"
#include "tensor_map.h"

namespace rift {

cudaError_t moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                         cudaStream_t stream);

}  // namespace rift
