// As much of the CUDA runtime as csrc's headers and bindings name.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorLaunchFailure";
}

// What the emulator found, for the exception that bindings.cpp raises.
const char* cudaGetErrorString(cudaError_t error);
