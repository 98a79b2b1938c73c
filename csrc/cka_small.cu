#include "cka_small.cuh"

#include <algorithm>

#include "cka_small.h"

namespace rift {
namespace {

using Kernel = void (*)(CkaSmallArguments);

template <int ROWS, bool CLUSTER>
Kernel kernel_of(Type type) {
  switch (type) {
    case Type::bf16: return cka_small_kernel<Bf16, Bf16, ROWS, CLUSTER>;
    case Type::fp16: return cka_small_kernel<Half, float, ROWS, CLUSTER>;
    default: return cka_small_kernel<float, float, ROWS, CLUSTER>;
  }
}

template <bool CLUSTER>
Kernel kernel_of(Type type, int rows) {
  switch (padded_rows(rows)) {
    case 16: return kernel_of<16, CLUSTER>(type);
    case 32: return kernel_of<32, CLUSTER>(type);
    case 64: return kernel_of<64, CLUSTER>(type);
    default: return kernel_of<128, CLUSTER>(type);
  }
}

Kernel kernel_of(Type type, int rows, bool cluster) {
  return cluster ? kernel_of<true>(type, rows) : kernel_of<false>(type, rows);
}

}  // namespace

cudaError_t cka_small_plan(int rows, int width, CkaSmallPlan* plan) {
  *plan = {};
  int device = 0, major = 0, shared = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&processors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess || rows > MAX_ROWS) return error;
  // Compiled for older GPUs only, the kernels that run here, from PTX, have no clusters.
  cudaFuncAttributes compiled = {};
  const Kernel kernel = kernel_of(Type::fp32, rows, false);
  error = cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  major = std::min(major, compiled.ptxVersion / 10);
  *plan = cka_small_plan(rows, width, major, shared, processors);
  return cudaSuccess;
}

cudaError_t cka_small(const CkaSmallArguments& arguments, const CkaSmallPlan& plan, Type type,
                      int rows, int entries, cudaStream_t stream) {
  if (entries == 0) return cudaSuccess;
  const Kernel kernel = kernel_of(type, rows, plan.cluster);
  // All that there is: a captured launch may need more than the last one of this kernel did.
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           plan.shared_most);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(entries));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (plan.cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    // All blocks at once, or an error: they wait for one another.
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, arguments);
  // The last error, too, so that it is not found by somebody else.
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

}  // namespace rift
