// Instructions that C++ has no name for. tests/support/emulator/emulated_primitives.h implements
// them on a CPU.
#pragma once

#ifdef RIFT_EMULATOR
#include "emulated_primitives.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace rift {

// bfloat16 and float16 as bits: including CUDA's headers for them would take longer to compile than
// all kernels together.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ inline float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t float_to_bits(float x) { return __float_as_uint(x); }

__device__ inline uint16_t round_to_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Rounds two floats; the first is in the low bits.
__device__ inline uint32_t round_to_bf16_pair(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

__device__ inline uint16_t round_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ inline float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix
// l / 8. It receives elements (l / 4, 2 (l % 4) + {0, 1}) of each matrix or, transposed, their
// mirror images.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Stores four 8 x 8 matrices, the opposite of load_matrices.
__device__ inline void store_matrices(const uint32_t (&r)[4], void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  // Each lane stores its own pairs.
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t start = __shfl_sync(0xFFFFFFFFu, address, matrix * 8 + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(start + lane % 4 * 4), "r"(r[matrix]) : "memory");
  }
#endif
}

// c += a b, where a is (16, 16) and b (16, 8), both bfloat16, and c is float32. With g = l / 4 and
// t = 2 (l % 4), lane l holds:
//   a  (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8), each with its right neighbour
//   b  (t, g), (t + 8, g), each with its lower neighbour
//   c  (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts a copy of 16 bytes to shared memory: the first `bytes` of the source, then zeros. Both
// addresses are multiples of 16. The target must not be read or written until wait_copies.
__device__ inline void copy_async(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(target))),
               "l"(__cvta_generic_to_global(source)), "r"(bytes)
               : "memory");
}

// Makes one group of the copies that this thread has started since its last group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most GROUPS of this thread's groups are pending; the others are visible to it.
template <int GROUPS>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// The same address in the shared memory of the cluster's block with this rank.
__device__ inline const float* map_to_rank(const float* local, int rank) {
#if __CUDA_ARCH__ >= 900
  const float* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return remote;
#else
  (void)rank;
  return local;
#endif
}

// Barrier of all threads of the cluster; makes their earlier writes visible to one another.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// The two halves of that barrier, for threads that have written nothing that others read: no writes
// are made visible.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

__device__ inline unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

}  // namespace rift
#endif
