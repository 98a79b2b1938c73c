// How kernels are launched, and what is said of a call that fails.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace rift {

// Throws the error that a call of the runtime has answered. The runtime keeps it as well, for whoever
// asks for the last one: nobody is to find it there, and to blame another call for it.
inline void check(cudaError_t error, const char* whose, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(whose) + ": " + call + ": " + cudaGetErrorName(error) +
                           ": " + cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current device", "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "the current device",
        "cudaDeviceGetAttribute");
  return value;
}

struct Launch {
  const char* kernel;  // its name, for errors
  int blocks, threads;
  int shared = 0;         // bytes of a block
  int cluster = 0;        // blocks of one; 0: no clusters
  int entries = 1;        // rows of blocks
  bool together = false;  // all blocks run at once: they wait for one another
};

// Bytes of shared memory that a kernel may have without asking.
constexpr int DEFAULT_SHARED_BYTES = 48 * 1024;

template <typename... Arguments>
void launch(const Launch& how, cudaStream_t stream, void (*kernel)(Arguments...),
            const Arguments&... arguments) {
  if (how.shared > DEFAULT_SHARED_BYTES) {
    // All that there is: a captured launch may need more than the last one of this kernel did.
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          how.kernel, "cudaFuncSetAttribute");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks), static_cast<unsigned>(how.entries));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (how.cluster > 0) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (how.together) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...), how.kernel, "cudaLaunchKernelEx");
}

}  // namespace rift
