#include "scale.cuh"

namespace rift {
namespace {

// Enough blocks to fill any GPU, after which threads take several steps each.
constexpr long long MOST_BLOCKS = 1024;

template <typename Unit, typename Out>
cudaError_t launch(const ScaledTensors& all, cudaStream_t stream) {
  long long largest = 0;
  for (int i = 0; i < all.size; ++i) {
    const long long size = all.tensors[i].count * all.tensors[i].entries;
    largest = size > largest ? size : largest;
  }
  if (largest == 0) return cudaSuccess;
  constexpr long long STEP = SCALE_THREADS * vector_size<Unit, Out>();
  const long long blocks = (largest + STEP - 1) / STEP;
  const dim3 grid(static_cast<unsigned>(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS),
                  static_cast<unsigned>(all.size));
  scale_kernel<Unit, Out><<<grid, SCALE_THREADS, 0, stream>>>(all);
  return cudaGetLastError();
}

}  // namespace

cudaError_t scale(const ScaledTensors& all, Type unit, Type out, cudaStream_t stream) {
  if (unit == Type::bf16) {
    return out == Type::bf16 ? launch<Bf16, Bf16>(all, stream) : cudaErrorInvalidValue;
  }
  if (unit == Type::fp16) return cudaErrorInvalidValue;
  switch (out) {
    case Type::bf16: return launch<float, Bf16>(all, stream);
    case Type::fp16: return launch<float, Half>(all, stream);
    default: return launch<float, float>(all, stream);
  }
}

}  // namespace rift
