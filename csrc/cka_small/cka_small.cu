#include "cka_small/cka_small.cuh"

#include <algorithm>

#include "cka_small/cka_small.h"
#include "common/launch.h"

namespace rift {
namespace {

using Kernel = void (*)(CkaSmallArguments);

template <int ROWS, bool CLUSTER>
Kernel kernel_of(ElementType type) {
  switch (type) {
    case ElementType::bf16: return cka_small_kernel<Bf16, Bf16, ROWS, CLUSTER>;
    case ElementType::fp16: return cka_small_kernel<Half, float, ROWS, CLUSTER>;
    default: return cka_small_kernel<float, float, ROWS, CLUSTER>;
  }
}

template <bool CLUSTER>
Kernel kernel_of(ElementType type, int rows) {
  switch (padded_rows(rows)) {
    case 16: return kernel_of<16, CLUSTER>(type);
    case 32: return kernel_of<32, CLUSTER>(type);
    case 64: return kernel_of<64, CLUSTER>(type);
    default: return kernel_of<128, CLUSTER>(type);
  }
}

Kernel kernel_of(ElementType type, int rows, bool cluster) {
  return cluster ? kernel_of<true>(type, rows) : kernel_of<false>(type, rows);
}

}  // namespace

CkaSmallPlan cka_small_plan(int rows, int width) {
  if (rows > MAX_ROWS) return {};
  // An extension compiled for older GPUs runs here from their PTX, which has no clusters.
  cudaFuncAttributes compiled = {};
  const Kernel kernel = kernel_of(ElementType::fp32, rows, false);
  check(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel)), "cka_small",
        "cudaFuncGetAttributes");
  const int major =
      std::min(device_attribute(cudaDevAttrComputeCapabilityMajor), compiled.ptxVersion / 10);
  return cka_small_plan(rows, width, major,
                        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        device_attribute(cudaDevAttrMultiProcessorCount));
}

void cka_small(const CkaSmallArguments& arguments, const CkaSmallPlan& plan, ElementType type,
               int rows, int entries, cudaStream_t stream) {
  LaunchSettings settings{"cka_small", plan.blocks, CKA_SMALL_THREADS, plan.shared_bytes};
  settings.entries = entries;
  if (plan.cluster) {
    settings.cluster_size = plan.blocks;
  } else {
    settings.cooperative = true;
  }
  launch(settings, stream, kernel_of(type, rows, plan.cluster), arguments);
}

}  // namespace rift
