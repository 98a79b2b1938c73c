#include "common/driver.h"

#include <mutex>
#include <stdexcept>
#include <vector>

#include "common/launch.h"

namespace rift {
namespace {

// What the runtime works in, and everybody who shares its memory; kept from the first call on.
CUcontext primary_context(int device) {
  static std::mutex mutex;
  static std::vector<CUcontext> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = static_cast<int>(contexts.size());
  if (device < known && contexts[device]) return contexts[device];
  const std::string whose = "device " + std::to_string(device);
  CUdevice handle = 0;
  check_driver(driver_function<decltype(&cuInit)>("cuInit")(0), whose, "cuInit");
  check_driver(driver_function<decltype(&cuDeviceGet)>("cuDeviceGet")(&handle, device), whose,
               "cuDeviceGet");
  const auto retain =
      driver_function<decltype(&cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
  CUcontext context = nullptr;
  check_driver(retain(&context, handle), whose, "cuDevicePrimaryCtxRetain");
  if (device >= known) contexts.resize(device + 1);
  contexts[device] = context;
  return context;
}

}  // namespace

void* driver_address(const char* name) {
  void* found = nullptr;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, nullptr), name,
        "cudaGetDriverEntryPointByVersion");
#else
  // That of the toolkit's own version.
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault), name, "cudaGetDriverEntryPoint");
#endif
  if (found) return found;
  throw std::runtime_error(std::string(name) + ": the driver has no such function; it is too old");
}

void check_driver(CUresult result, const std::string& whose, const char* call) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  try {
    driver_function<decltype(&cuGetErrorName)>("cuGetErrorName")(result, &name);
  } catch (const std::runtime_error&) {
    // The number has to do.
  }
  throw std::runtime_error(whose + ": " + call + ": " + (name ? name : "CUresult") + " (" +
                           std::to_string(static_cast<int>(result)) + ")");
}

DeviceGuard::DeviceGuard(int device) : entered(device >= 0) {
  if (!entered) return;
  static const auto push = driver_function<decltype(&cuCtxPushCurrent)>("cuCtxPushCurrent");
  check_driver(push(primary_context(device)), "device " + std::to_string(device),
               "cuCtxPushCurrent");
}

DeviceGuard::~DeviceGuard() {
  if (!entered) return;
  CUcontext context = nullptr;
  // Found, because the other one was; a failure here has nobody to be told.
  static const auto pop = driver_function<decltype(&cuCtxPopCurrent)>("cuCtxPopCurrent");
  pop(&context);
}

}  // namespace rift
