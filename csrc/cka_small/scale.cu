#include "cka_small/scale.cuh"

#include <algorithm>

#include "common/launch.h"

namespace rift {
namespace {

// Enough blocks to fill any GPU, after which threads take several steps each.
constexpr long long MOST_BLOCKS = 1024;

template <typename Unit, typename Out>
void scale(const ScaledTensors& all, cudaStream_t stream) {
  long long largest = 0;
  for (int i = 0; i < all.size; ++i) {
    largest = std::max(largest, all.tensors[i].count * all.tensors[i].entries);
  }
  if (largest == 0) return;
  constexpr long long STEP = SCALE_THREADS * vector_size<Unit, Out>();
  const long long blocks = std::min((largest + STEP - 1) / STEP, MOST_BLOCKS);
  Launch how{"scale", static_cast<int>(blocks), SCALE_THREADS};
  how.entries = all.size;
  launch(how, stream, scale_kernel<Unit, Out>, all);
}

}  // namespace

void scale(const ScaledTensors& all, ElementType unit, ElementType out, cudaStream_t stream) {
  if (unit == ElementType::bf16) return scale<Bf16, Bf16>(all, stream);
  switch (out) {
    case ElementType::bf16: return scale<float, Bf16>(all, stream);
    case ElementType::fp16: return scale<float, Half>(all, stream);
    default: return scale<float, float>(all, stream);
  }
}

}  // namespace rift
