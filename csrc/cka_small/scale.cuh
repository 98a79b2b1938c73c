// out = incoming * unit: multiplies the gradients of the values by the incoming gradient.
//
// The product is computed in float32. The device reads `incoming`, so that the host need not wait
// for it. A thread owns 16 bytes of a tensor at a time; blockIdx.y is the index of the tensor.
//
// Memory traffic: each element of `unit` and `out` once.
#pragma once

#include "cka_small/scale.h"
#include "common/elements.cuh"
#include "common/host_device.h"

namespace rift {

constexpr int SCALE_THREADS = 256;

template <typename Unit, typename Out, int SIZE>
__device__ void scale_tensor(const ScaledTensor& tensor) {
  const auto* unit = static_cast<const Vector<Unit, SIZE>*>(tensor.unit);
  auto* out = static_cast<Vector<Out, SIZE>*>(tensor.out);
  const long long steps = tensor.count * tensor.entries / SIZE, count = tensor.count / SIZE;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < steps;
       i += static_cast<long long>(gridDim.x) * blockDim.x) {
    const Vector<Unit, SIZE> source = unit[i];
    // A division of 64 bits takes longer than all the rest.
    const float factor = tensor.incoming[tensor.entries == 1 ? 0 : i / count];
    Vector<Out, SIZE> product;
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      const float x = to_float(source.elements[k]);
      // The gradient of a masked row stays 0 even if the incoming one is Inf.
      from_float(x == 0 ? 0 : factor * x, &product.elements[k]);
    }
    out[i] = product;
  }
}

// The number of elements of the wider type that fill 16 bytes.
template <typename Unit, typename Out>
RIFT_HOST_DEVICE constexpr int vector_size() {
  return 16 / static_cast<int>(sizeof(Unit) > sizeof(Out) ? sizeof(Unit) : sizeof(Out));
}

template <typename Unit, typename Out>
__global__ void __launch_bounds__(SCALE_THREADS)
    scale_kernel(const __grid_constant__ ScaledTensors arguments) {
  const ScaledTensor& tensor = arguments.tensors[blockIdx.y];
  constexpr int SIZE = vector_size<Unit, Out>();
  const auto addresses =
      reinterpret_cast<uintptr_t>(tensor.unit) | reinterpret_cast<uintptr_t>(tensor.out);
  // A vector must not span two entries, because their factors differ.
  if (addresses % 16 == 0 && tensor.count % SIZE == 0) {
    scale_tensor<Unit, Out, SIZE>(tensor);
  } else {
    scale_tensor<Unit, Out, 1>(tensor);
  }
}

}  // namespace rift
