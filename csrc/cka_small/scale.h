// The last step of a backward; see scale.cuh.
#pragma once

#include <cuda_runtime.h>

#include "common/element_type.h"

namespace rift {

// Tensors of one launch: by value, in the 4 KiB that every GPU has for arguments.
constexpr int MAX_TENSORS = 64;

// A batch of `entries` pieces of `count` elements each, contiguous.
struct ScaledTensor {
  const void* unit;
  void* out;
  const float* incoming;  // one an entry
  long long count, entries;
};

struct ScaledTensors {
  ScaledTensor tensors[MAX_TENSORS];
  int size;
};

// From bfloat16 to bfloat16, from float32 to any type.
void scale(const ScaledTensors& all, ElementType unit, ElementType out, cudaStream_t stream);

}  // namespace rift
