// The last step of the backward pass; see scale.cuh.
#pragma once

#include <cuda_runtime.h>

#include "common/element_type.h"

namespace rift {

// Tensors of one launch. They are passed by value, in the 4 KiB that every GPU has for arguments.
constexpr int MAX_TENSORS = 64;

// A contiguous batch of `entries` gradients with `count` elements each.
struct ScaledTensor {
  const void* unit;
  void* out;
  const float* incoming;  // one per entry
  long long count, entries;
};

struct ScaledTensors {
  ScaledTensor tensors[MAX_TENSORS];
  int size;
};

// From bfloat16 to bfloat16, or from float32 to any type.
void scale(const ScaledTensors& arguments, ElementType unit, ElementType out, cudaStream_t stream);

}  // namespace rift
