// A CUDA runtime and driver that launch kernels on the emulated GPU, and return errors for wrong
// calls. Environment variables describe the GPU:
//   RIFT_EMULATED_MAJOR       major compute capability; 8 has no clusters
//   RIFT_EMULATED_SHARED      bytes of shared memory that a block may have
//   RIFT_EMULATED_PROCESSORS  multiprocessors
//   RIFT_EMULATED_SEED        seed of the order in which threads run
//   RIFT_EMULATED_FAILS       function of the runtime that returns an error
//   RIFT_EMULATED_ARCHS       architectures that the extension was compiled for
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <map>
#include <set>

#include "emulated_sm90.h"

namespace {

constexpr int DEVICES = 2;
constexpr int DEFAULT_SHARED_BYTES = 48 * 1024;

// The stack of current contexts and the last error, which belong to a thread as in CUDA.
thread_local std::vector<CUcontext> contexts;
thread_local cudaError_t last = cudaSuccess;
thread_local std::string cause;
int launched_on = -1;
std::set<const void*> launched;

int setting(const char* name, int default_value) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : default_value;
}

cudaError_t fail(cudaError_t error, const std::string& reason) {
  last = error;
  cause = reason;
  return error;
}

// Whether this function was told to fail.
bool fails(const char* function) {
  const char* name = std::getenv("RIFT_EMULATED_FAILS");
  return name && std::strcmp(name, function) == 0;
}

CUcontext primary_context(int device) {
  return reinterpret_cast<CUcontext>(static_cast<intptr_t>(device + 1));
}

// The shared memory that each kernel has opted in to.
std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

// The cluster size of a launch; 0: no clusters.
unsigned cluster_size(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) return attribute.val.clusterDim.x;
  }
  return 0;
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative)
      return config.attrs[i].val.cooperative;
  }
  return false;
}

}  // namespace

// Functions that tests call through ctypes.
#define FOR_TESTS extern "C" __attribute__((visibility("default")))

// The current device of this thread, or -1.
FOR_TESTS int emulated_device() {
  return contexts.empty() ? -1 : static_cast<int>(reinterpret_cast<intptr_t>(contexts.back())) - 1;
}
FOR_TESTS void emulated_enter(int device) { contexts.push_back(primary_context(device)); }
FOR_TESTS int emulated_device_of_last_launch() { return launched_on; }
// Offsets in this library of the kernels launched since the last call, one per line.
FOR_TESTS const char* emulated_launches() {
  static std::string lines;
  lines.clear();
  for (const void* kernel : launched) {
    Dl_info library;
    dladdr(kernel, &library);
    lines += std::to_string(static_cast<const char*>(kernel) -
                            static_cast<const char*>(library.dli_fbase)) +
             "\n";
  }
  launched.clear();
  return lines.c_str();
}
FOR_TESTS int emulated_last_error() { return last; }
// The smallest shared memory that a kernel has opted in to since the last call.
FOR_TESTS int emulated_least_allowed() {
  int least = 1 << 30;
  for (const auto& [kernel, bytes] : shared_limits()) least = std::min(least, bytes);
  shared_limits().clear();
  return least;
}

namespace emulator {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   std::function<void()> run_kernel) {
  if (fails("cudaLaunchKernelEx"))
    return fail(cudaErrorLaunchOutOfResources, "it was told to fail");
  const dim3& grid = config.gridDim;
  const unsigned cluster = cluster_size(config);
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || config.blockDim.x == 0 ||
      config.blockDim.x > 1024 || (cluster > 0 && grid.x % cluster != 0)) {
    return fail(cudaErrorInvalidConfiguration, "no such grid");
  }
  if (cluster > 0 && (setting("RIFT_EMULATED_MAJOR", 9) < 9 || cluster > 8)) {
    return fail(cudaErrorInvalidValue, "no such clusters");
  }
  const auto opted_in = shared_limits().find(kernel);
  const int limit = opted_in == shared_limits().end() ? DEFAULT_SHARED_BYTES : opted_in->second;
  if (static_cast<int>(config.dynamicSmemBytes) > limit) {
    return fail(cudaErrorInvalidValue, "more shared memory than the kernel has opted in to");
  }
  if (is_cooperative(config) &&
      grid.x * grid.y > static_cast<unsigned>(setting("RIFT_EMULATED_PROCESSORS", 132))) {
    return fail(cudaErrorCooperativeLaunchTooLarge, "more blocks than can be resident");
  }
  // A launch makes the primary context current if there is none.
  if (contexts.empty()) contexts.push_back(primary_context(0));
  launched_on = emulated_device();
  launched.insert(kernel);
  try {
    const GridShape shape{grid.x, grid.y, config.blockDim.x, config.dynamicSmemBytes, cluster};
    run(std::move(run_kernel), shape, static_cast<unsigned>(setting("RIFT_EMULATED_SEED", 0)));
  } catch (const std::exception& error) {
    return fail(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

}  // namespace emulator

const char* emulated_architectures() {
  const char* text = std::getenv("RIFT_EMULATED_ARCHS");
  return text ? text : "80;90a";
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    default: return "cudaErrorLaunchFailure";
  }
}

const char* cudaGetErrorString(cudaError_t) { return cause.c_str(); }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = std::max(emulated_device(), 0);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = setting("RIFT_EMULATED_PROCESSORS", 132); break;
    case cudaDevAttrComputeCapabilityMajor: *value = setting("RIFT_EMULATED_MAJOR", 9); break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: *value = setting("RIFT_EMULATED_SHARED", 227 * 1024);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (fails("cudaFuncSetAttribute")) return fail(cudaErrorInvalidValue, "it was told to fail");
  if (value > setting("RIFT_EMULATED_SHARED", 227 * 1024)) {
    return fail(cudaErrorInvalidValue, "more shared memory than a block may have");
  }
  shared_limits()[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (fails("cudaFuncGetAttributes")) return fail(cudaErrorInvalidValue, "it was told to fail");
  attributes->ptxVersion = 10 * setting("RIFT_EMULATED_MAJOR", 9);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long, void*) {
  static const std::map<std::string, void*> functions{
      {"cuInit", reinterpret_cast<void*>(&cuInit)},
      {"cuDeviceGet", reinterpret_cast<void*>(&cuDeviceGet)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(&cuDevicePrimaryCtxRetain)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(&cuCtxPushCurrent)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(&cuCtxPopCurrent)},
      {"cuGetErrorName", reinterpret_cast<void*>(&cuGetErrorName)},
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&cuTensorMapEncodeTiled)},
  };
  const auto entry = functions.find(name);
  *function = entry == functions.end() ? nullptr : entry->second;
  return cudaSuccess;
}

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = primary_context(device);
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                              : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                void* address, const cuuint64_t* size, const cuuint64_t* stride,
                                const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  const bool fits = reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride[0] % 16 == 0 &&
                    stride[0] >= 2 * size[0] && stride[0] < 1ull << 40;
  if (rank != 2 || !fits || size[0] == 0 || size[1] == 0 || box[0] != 64 || box[1] > 256) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  new (map) rift::TensorMap{static_cast<const uint16_t*>(address),
                            static_cast<long long>(stride[0] / 2),
                            static_cast<int>(size[1]),
                            static_cast<int>(size[0]),
                            static_cast<int>(box[1]),
                            {}};
  return CUDA_SUCCESS;
}
