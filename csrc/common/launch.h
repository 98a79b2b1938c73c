// Kernel launches, and exceptions for CUDA calls that fail.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace rift {

// Throws unless a runtime call returned success. It also clears the runtime's last error, which a
// later cudaGetLastError would otherwise blame on another call.
inline void check(cudaError_t error, const char* subject, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(subject) + ": " + call + ": " + cudaGetErrorName(error) +
                           ": " + cudaGetErrorString(error));
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current device", "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "the current device",
        "cudaDeviceGetAttribute");
  return value;
}

struct LaunchSettings {
  const char* kernel;  // name in error messages
  int blocks, threads;
  int shared_bytes = 0;      // dynamic shared memory of a block
  int cluster_size = 0;      // blocks of a cluster; 0: no clusters
  int entries = 1;           // the grid's y dimension
  bool cooperative = false;  // blocks wait for one another, so all must be resident at once
};

// Dynamic shared memory that a kernel may use without opting in.
constexpr int DEFAULT_SHARED_BYTES = 48 * 1024;

template <typename... Arguments>
void launch(const LaunchSettings& settings, cudaStream_t stream, void (*kernel)(Arguments...),
            const Arguments&... arguments) {
  if (settings.shared_bytes > DEFAULT_SHARED_BYTES) {
    // Always the device's limit: a launch replayed from a CUDA graph may need more than the latest
    // launch of this kernel.
    const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, limit),
          settings.kernel, "cudaFuncSetAttribute");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(settings.blocks), static_cast<unsigned>(settings.entries));
  config.blockDim = dim3(static_cast<unsigned>(settings.threads));
  config.dynamicSmemBytes = static_cast<size_t>(settings.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (settings.cluster_size > 0) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(settings.cluster_size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (settings.cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...), settings.kernel, "cudaLaunchKernelEx");
}

}  // namespace rift
