// Conversion of features and gradients to and from float32, and vectors of them.
#pragma once

#include "common/primitives.cuh"

namespace rift {

__device__ inline float bf16_to_float(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return bf16_to_float(x.bits); }
__device__ inline float to_float(Half x) { return half_to_float(x.bits); }

__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, Bf16* out) { out->bits = round_to_bf16(x); }
__device__ inline void from_float(float x, Half* out) { out->bits = round_to_half(x); }

// Splits each of two floats into a sum of two bfloat16; packs the high halves and the low halves.
__device__ inline void split_pair(float first, float second, uint32_t& high, uint32_t& low) {
  high = round_to_bf16_pair(first, second);
  low = round_to_bf16_pair(first - bits_to_float(high << 16),
                           second - bits_to_float(high & 0xFFFF0000));
}

// Adjacent elements that one instruction reads or writes.
template <typename T, int SIZE>
struct alignas(sizeof(T) * SIZE) Vector {
  T elements[SIZE];
};

}  // namespace rift
