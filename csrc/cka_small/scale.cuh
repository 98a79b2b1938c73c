// out = incoming * unit: gradients of a loss whose own gradient is 1, times what arrives instead.
//
// The product is in float32; `incoming` is read by the device, so that nobody waits for its value.
// Blocks own 16 bytes a thread of one tensor, blockIdx.y counting tensors.
//
// Bytes: every element of both once.
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
    const Vector<Unit, SIZE> from = unit[i];
    const float factor = tensor.incoming[i / count];
    Vector<Out, SIZE> to;
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      const float x = to_float(from.elements[k]);
      // That of a masked row stays 0 where Inf comes in.
      from_float(x == 0 ? 0 : factor * x, &to.elements[k]);
    }
    out[i] = to;
  }
}

// Elements that fill 16 bytes of the wider type.
template <typename Unit, typename Out>
RIFT_HOST_DEVICE constexpr int vector_size() {
  return 16 / static_cast<int>(sizeof(Unit) > sizeof(Out) ? sizeof(Unit) : sizeof(Out));
}

template <typename Unit, typename Out>
__global__ void __launch_bounds__(SCALE_THREADS)
    scale_kernel(const __grid_constant__ ScaledTensors all) {
  const ScaledTensor& tensor = all.tensors[blockIdx.y];
  constexpr int SIZE = vector_size<Unit, Out>();
  const auto addresses =
      reinterpret_cast<uintptr_t>(tensor.unit) | reinterpret_cast<uintptr_t>(tensor.out);
  // No vector of two entries, which have different factors.
  if (addresses % 16 == 0 && tensor.count % SIZE == 0) {
    scale_tensor<Unit, Out, SIZE>(tensor);
  } else {
    scale_tensor<Unit, Out, 1>(tensor);
  }
}

}  // namespace rift
