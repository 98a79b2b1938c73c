// Checks of the arguments that come from Python: a wrong one becomes a ValueError that names it.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/element_type.h"
#include "common/launch.h"

namespace rift {

using Address = unsigned long long;

inline ElementType check_element_type(const char* name, int value) {
  if (value >= 0 && value <= 2) return static_cast<ElementType>(value);
  throw pybind11::value_error(std::string(name) +
                              " must be 0 (bfloat16), 1 (float16) or 2 (float32); got " +
                              std::to_string(value));
}

inline int check_range(const char* name, long long value, long long limit) {
  if (value >= 1 && value <= limit) return static_cast<int>(value);
  throw pybind11::value_error(std::string(name) + " must be 1 to " + std::to_string(limit) +
                              "; got " + std::to_string(value));
}

template <typename T>
T* optional_pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
T* required_pointer(const char* name, Address address) {
  if (address != 0) return reinterpret_cast<T*>(address);
  throw pybind11::value_error(std::string(name) + " must be an address; got 0");
}

// Kernels for Hopper are empty unless compiled for sm_90a, whose code runs only on Hopper.
inline void check_hopper(const char* kernel) {
  const int number = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
                     device_attribute(cudaDevAttrComputeCapabilityMinor);
  const std::string built = ";" + std::string(RIFT_ARCHS) + ";";
  if (number == 90 && built.find(";90a;") != std::string::npos) return;
  throw std::runtime_error(std::string(kernel) +
                           ": needs RIFT_KERNELS_CUDA_ARCHS with 90a and a GPU of " +
                           "compute capability 9.0; got " + RIFT_ARCHS + " and " +
                           std::to_string(number / 10) + "." + std::to_string(number % 10));
}

}  // namespace rift
