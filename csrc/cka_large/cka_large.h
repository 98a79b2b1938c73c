// Linear CKA in covariance form, bfloat16; see layout.h for the launches.
#pragma once

#include <cuda_runtime.h>

#include "cka_large/layout.h"

namespace rift {

void cka_large_forward(const CkaLargeArguments& arguments, cudaStream_t stream);

// Of side 0, the student, or 1.
void cka_large_backward(const CkaLargeArguments& arguments, int side, const float* incoming,
                        void* grad, cudaStream_t stream);

}  // namespace rift
