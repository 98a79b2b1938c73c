// CUDA's intrinsics, and the instructions of csrc/common/primitives.cuh as the PTX manual defines
// them, on the emulated GPU.
#pragma once

#include <cmath>
#include <cstring>

#include "scheduler.h"
#include "tensor_cores.h"

using std::max;
using std::min;

// One thread of a block publishes the writes of the whole block with an atomic, or learns from one
// that other blocks have written. PTX's memory model then requires a fence between the atomic and
// the block's barrier. So a barrier fails if the last atomic still needs a fence, and an atomic
// fails if no fence follows the last barrier.
inline void __syncthreads() {
  emulator::Fiber& fiber = *emulator::grid->current;
  if (fiber.needs_fence) {
    throw std::runtime_error("no fence between an atomic and the barrier after it");
  }
  fiber.fenced = false;
  emulator::wait(emulator::grid->block().barrier);
}
inline void __syncwarp() { emulator::wait(emulator::grid->warp().barrier); }
inline void __threadfence() {
  emulator::grid->current->fenced = true;
  emulator::grid->current->needs_fence = false;
}

template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  emulator::Warp& warp = emulator::grid->warp();
  warp.value[threadIdx.x % 32] = static_cast<double>(x);
  emulator::wait(warp.barrier);
  const T result = static_cast<T>(warp.value[lane]);
  emulator::wait(warp.barrier);
  return result;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask) {
  return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ lane_mask);
}

inline unsigned __ballot_sync(unsigned, bool x) {
  emulator::Warp& warp = emulator::grid->warp();
  warp.value[threadIdx.x % 32] = x;
  emulator::wait(warp.barrier);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= (warp.value[lane] != 0) << lane;
  emulator::wait(warp.barrier);
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline unsigned atomicAdd(unsigned* counter, unsigned value) {
  emulator::Fiber& fiber = *emulator::grid->current;
  if (!fiber.fenced) {
    throw std::runtime_error("no fence between an atomic and the barrier before it");
  }
  fiber.needs_fence = true;
  const unsigned previous = *counter;
  *counter += value;
  return previous;
}

namespace rift {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// std::bit_cast of C++20.
template <typename To, typename From>
To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float bits_to_float(uint32_t bits) { return bit_cast<float>(bits); }
inline uint32_t float_to_bits(float x) { return bit_cast<uint32_t>(x); }

inline uint16_t round_to_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = float_to_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint32_t round_to_bf16_pair(float first, float second) {
  return round_to_bf16(first) | uint32_t{round_to_bf16(second)} << 16;
}

inline uint16_t round_to_half(float x) { return bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float half_to_float(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }

inline unsigned char* shared_memory() { return emulator::grid->block().shared.bytes.get(); }

// The same address in the shared memory of the cluster's block with this rank.
template <typename T>
T* remote_address(T* local, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(local) - shared_memory();
  return reinterpret_cast<T*>(emulator::grid->neighbour(rank).shared.bytes.get() + offset);
}

// The rows of four 8 x 8 matrices, of which each lane gives one. Throws if one is misaligned or if
// rows of a matrix lie in the same bank: they are accessed at once.
inline emulator::Warp& matrix_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("a row is misaligned");
  emulator::Warp& warp = emulator::grid->warp();
  warp.address[threadIdx.x % 32] = row;
  emulator::wait(warp.barrier);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (unsigned i = 0; i < 8; ++i) {
      banks |= 1u << reinterpret_cast<uintptr_t>(warp.address[matrix * 8 + i]) / 16 % 8;
    }
    if (banks != 0xFF) throw std::runtime_error("rows of a matrix lie in the same bank");
  }
  return warp;
}

// ldmatrix.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  emulator::Warp& warp = matrix_rows(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair = 0;
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned g = lane / 4, t = 2 * (lane % 4) + i;
      const unsigned matrix_row = transposed ? t : g, column = transposed ? g : t;
      const auto* elements = static_cast<const uint16_t*>(warp.address[matrix * 8 + matrix_row]);
      pair |= uint32_t{elements[column]} << (16 * i);
    }
    r[matrix] = pair;
  }
  emulator::wait(warp.barrier);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices(r, row, true);
}

// stmatrix.
inline void store_matrices(const uint32_t (&r)[4], void* row) {
  emulator::Warp& warp = matrix_rows(row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto* start = static_cast<const unsigned char*>(warp.address[matrix * 8 + lane / 4]);
    std::memcpy(const_cast<unsigned char*>(start) + lane % 4 * 4, r + matrix, 4);
  }
  emulator::wait(warp.barrier);
}

// The copy is made when it is waited for, and the target is NaN until then. That reveals both
// threads that read too early and threads that had not finished reading.
inline void copy_async(void* target, const void* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    throw std::runtime_error("a copy of 16 bytes is misaligned");
  }
  std::memset(target, 0xFF, 16);
  emulator::grid->current->copies.back().push_back([=] {
    std::memset(target, 0, 16);
    std::memcpy(target, source, static_cast<size_t>(bytes));
  });
}

inline void commit_copies() { emulator::grid->current->copies.emplace_back(); }

template <int GROUPS>
void wait_copies() {
  emulator::complete(emulator::grid->current->copies, GROUPS);
}

// The first or second bfloat16 of a pair.
inline float pair_element(uint32_t pair, unsigned index) {
  return bits_to_float((index ? pair >> 16 : pair & 0xFFFF) << 16);
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Warp& warp = emulator::grid->warp();
  const unsigned lane = threadIdx.x % 32;
  std::copy(a, a + 4, warp.a[lane]);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  emulator::wait(warp.barrier);
  for (unsigned part = 0; part < 4; ++part) {
    const unsigned row = lane / 4 + part / 2 * 8, column = 2 * (lane % 4) + part % 2;
    c[part] = emulator::add_products<8>(c[part], [&](int product) {
      // The lanes that hold a(row, k) and b(k, column).
      const auto k = static_cast<unsigned>(product);
      const uint32_t left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
      return static_cast<double>(pair_element(left, k % 2)) *
             static_cast<double>(pair_element(right, k % 2));
    });
  }
  emulator::wait(warp.barrier);
}

inline const float* map_to_rank(const float* local, int rank) {
  return remote_address(local, rank);
}

inline void cluster_barrier() { emulator::wait(emulator::grid->cluster()); }
inline void cluster_arrive() {
  emulator::grid->current->cluster_generation = emulator::arrive(emulator::grid->cluster());
}
inline void cluster_wait() {
  emulator::wait(emulator::grid->cluster(), emulator::grid->current->cluster_generation);
}

inline unsigned load_acquire(const unsigned* counter) {
  emulator::yield();
  return *counter;
}

}  // namespace rift
