// What the copy engine has to know of a matrix.
#pragma once

#include <cuda_runtime.h>

namespace rift {

struct TensorMap;

// bfloat16, row-major, rows at multiples of 16 bytes; fetched in boxes of 64 columns.
struct Matrix {
  const void* elements;
  long long stride;  // in elements
  long long rows;
  int columns;
};

// For a kernel of this name. The thread must have a context.
TensorMap encode_tensor_map(const Matrix& matrix, int box_rows, const char* kernel);

}  // namespace rift
