// The driver's functions, found when they are called: the extension loads where there is no driver.
#pragma once

#include <cuda.h>

#include <string>

namespace rift {

// Throws where the driver has none of this name.
void* driver_address(const char* name);

template <typename Function>
Function driver_function(const char* name) {
  return reinterpret_cast<Function>(driver_address(name));
}

// Throws what a function of the driver has answered, unless that is success.
void check_driver(CUresult result, const std::string& whose, const char* call);

// Makes a device this thread's, which may never have had one, and in the end again the one that was.
// A negative number, as memory of the host has it, leaves everything as it is.
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
