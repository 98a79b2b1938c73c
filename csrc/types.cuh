// Features and gradients: to and from float32, several at once.
#pragma once

#include "primitives.cuh"

namespace rift {

__device__ inline float bf16_to_float(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return bf16_to_float(x.bits); }
__device__ inline float to_float(Half x) { return half_to_float(x.bits); }

__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, Bf16* out) { out->bits = round_to_bf16(x); }
__device__ inline void from_float(float x, Half* out) { out->bits = round_to_half(x); }

// Neighbours that are read and written at once.
template <typename T, int SIZE>
struct alignas(sizeof(T) * SIZE) Vector {
  T elements[SIZE];
};

}  // namespace rift
