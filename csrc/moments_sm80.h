// Raw second moments of bfloat16 features on any GPU from sm_80 on; see moments_sm80.cuh.
#pragma once

#include <cuda_runtime.h>

#include "moments_layout.h"
#include "tensor_map.h"

namespace rift {

cudaError_t moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                         cudaStream_t stream);

}  // namespace rift
