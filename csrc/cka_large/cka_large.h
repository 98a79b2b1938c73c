// Linear CKA in covariance form, bfloat16; see layout.h for the launches.
#pragma once

#include <cuda_runtime.h>

#include "cka_large/layout.h"

namespace rift {

void covariance_forward(const CovarianceArguments& arguments, cudaStream_t stream);

// Of side 0, the student, or 1.
void covariance_backward(const CovarianceArguments& arguments, int side, const float* incoming,
                         void* grad, cudaStream_t stream);

}  // namespace rift
