// Linear CKA of many bfloat16 rows, in covariance form; see layout.h for the launches.
#pragma once

#include <cuda_runtime.h>

#include "cka_large/layout.h"

namespace rift {

void cka_large_forward(const CkaLargeArguments& arguments, cudaStream_t stream);

// The gradient of the student (side 0) or the teacher (side 1).
void cka_large_backward(const CkaLargeArguments& arguments, int side, const float* incoming,
                        void* grad, cudaStream_t stream);

}  // namespace rift
