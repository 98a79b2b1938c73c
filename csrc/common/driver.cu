#include "common/driver.h"

#include <mutex>
#include <stdexcept>
#include <vector>

#include "common/launch.h"

namespace rift {
namespace {

// The context that the CUDA runtime and everything sharing its memory uses; retained from the first
// call on.
CUcontext primary_context(int device) {
  static std::mutex mutex;
  static std::vector<CUcontext> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto count = static_cast<int>(contexts.size());
  if (device < count && contexts[device]) return contexts[device];
  const std::string subject = "device " + std::to_string(device);
  CUdevice handle = 0;
  check_driver(driver_function<decltype(&cuInit)>("cuInit")(0), subject, "cuInit");
  check_driver(driver_function<decltype(&cuDeviceGet)>("cuDeviceGet")(&handle, device), subject,
               "cuDeviceGet");
  const auto retain =
      driver_function<decltype(&cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
  CUcontext context = nullptr;
  check_driver(retain(&context, handle), subject, "cuDevicePrimaryCtxRetain");
  if (device >= count) contexts.resize(device + 1);
  contexts[device] = context;
  return context;
}

}  // namespace

void* driver_address(const char* name) {
  void* address = nullptr;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, nullptr), name,
        "cudaGetDriverEntryPointByVersion");
#else
  // This one looks for the version of the toolkit itself.
  check(cudaGetDriverEntryPoint(name, &address, cudaEnableDefault), name,
        "cudaGetDriverEntryPoint");
#endif
  if (address) return address;
  throw std::runtime_error(std::string(name) + ": the driver has no such function; it is too old");
}

void check_driver(CUresult result, const std::string& subject, const char* call) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  try {
    driver_function<decltype(&cuGetErrorName)>("cuGetErrorName")(result, &name);
  } catch (const std::runtime_error&) {
    // The message then shows the number alone.
  }
  throw std::runtime_error(subject + ": " + call + ": " + (name ? name : "CUresult") + " (" +
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
  // The lookup cannot fail, because that of cuCtxPushCurrent did not. The result is ignored,
  // because a destructor must not throw.
  static const auto pop = driver_function<decltype(&cuCtxPopCurrent)>("cuCtxPopCurrent");
  pop(&context);
}

}  // namespace rift
