// Descriptors of matrices for the copy engine.
#pragma once

#include <cuda_runtime.h>

namespace rift {

struct TensorMap;

// A row-major bfloat16 matrix whose rows begin at multiples of 16 bytes.
struct Matrix {
  const void* elements;
  long long stride;  // in elements
  long long rows;
  int columns;
};

// Describes a matrix that is copied in boxes of BOX_COLUMNS columns and `box_rows` rows. The thread
// must have a current context. `kernel` is the name in error messages.
TensorMap encode_tensor_map(const Matrix& matrix, int box_rows, const char* kernel);

}  // namespace rift
