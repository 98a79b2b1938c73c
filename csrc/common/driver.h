// Functions of the CUDA driver, looked up at the first call, so that the extension loads on
// machines without a driver.
#pragma once

#include <cuda.h>

#include <string>

namespace rift {

// The address of a driver function; throws if the driver has none of this name.
void* driver_address(const char* name);

template <typename Function>
Function driver_function(const char* name) {
  return reinterpret_cast<Function>(driver_address(name));
}

// Throws unless a driver call returned success. The message names the subject and the call.
void check_driver(CUresult result, const std::string& subject, const char* call);

// Makes a device current for this thread, which may have had none, and restores the previous one at
// the end. A negative device, as host memory reports, changes nothing.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool entered;
};

}  // namespace rift
