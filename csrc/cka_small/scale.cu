#include "cka_small/scale.cuh"

#include <algorithm>

#include "common/launch.h"

namespace rift {
namespace {

// Enough blocks to fill any GPU; beyond that, threads take several steps each.
constexpr long long MAX_BLOCKS = 1024;

template <typename Unit, typename Out>
void scale(const ScaledTensors& arguments, cudaStream_t stream) {
  long long largest = 0;
  for (int i = 0; i < arguments.size; ++i) {
    largest = std::max(largest, arguments.tensors[i].count * arguments.tensors[i].entries);
  }
  if (largest == 0) return;
  constexpr long long STEP = SCALE_THREADS * vector_size<Unit, Out>();
  const long long blocks = std::min((largest + STEP - 1) / STEP, MAX_BLOCKS);
  LaunchSettings settings{"scale", static_cast<int>(blocks), SCALE_THREADS};
  settings.entries = arguments.size;
  launch(settings, stream, scale_kernel<Unit, Out>, arguments);
}

}  // namespace

void scale(const ScaledTensors& arguments, ElementType unit, ElementType out, cudaStream_t stream) {
  if (unit == ElementType::bf16) return scale<Bf16, Bf16>(arguments, stream);
  switch (out) {
    case ElementType::bf16: return scale<float, Bf16>(arguments, stream);
    case ElementType::fp16: return scale<float, Half>(arguments, stream);
    default: return scale<float, float>(arguments, stream);
  }
}

}  // namespace rift
