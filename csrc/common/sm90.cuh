// Hopper's instructions: mbarriers, the copy engine (TMA), and matrix products of a warpgroup
// (WGMMA). tests/support/emulator/emulated_sm90.h implements them on a CPU.
#pragma once

#ifdef RIFT_EMULATOR
#include "emulated_sm90.h"
#else

#include "common/elements.cuh"

namespace rift {

// A CUtensorMap, which only the driver can fill.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

using Mbarrier = uint64_t;

__device__ inline void init_barrier(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes barriers just initialized visible to the copy engine and to the cluster.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives at the barrier with the same address in the cluster's block with this rank.
//
// Its release is of this block's scope, the default. `.release.cluster` would compile to a fence of
// the whole GPU. None is needed to hand back a stage that was only read: the reads are complete,
// because products were waited for and loaded registers were used. There is nothing to make
// visible to the other block's copy engine, which writes next.
__device__ inline void arrive_remote(Mbarrier* barrier, int rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrives, and makes the phase wait for this many bytes of copies as well.
__device__ inline void arrive_expect_tx(Mbarrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase with this parity has completed.
__device__ inline void wait_barrier(Mbarrier* barrier, unsigned parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred complete;\n\t"
      "WAIT:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n\t"
      "@complete bra DONE;\n\t"
      "bra WAIT;\n\t"
      "DONE:\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts to copy a box of the matrix that begins at this column and row. Its rows are 128 bytes and
// swizzled: vector c of 16 bytes in row r lies at position c ^ (r % 8). Zeros beyond the matrix.
__device__ inline void copy_box(void* target, const TensorMap* map, int column, int row,
                                Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(target)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same into both blocks of a cluster of two; the barrier of each counts the bytes.
__device__ inline void copy_box_multicast(void* target, const TensorMap* map, int column, int row,
                                          Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// A value that is the same in all lanes, so that the compiler knows. It then computes with it, and
// with descriptors, once for the warp.
__device__ inline int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

// The producer warpgroup gives registers to the consumers.
__device__ inline void deallocate_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 56;" ::: "memory");
}
__device__ inline void allocate_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 224;" ::: "memory");
}

__device__ inline void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Descriptor of an operand in boxes of copy_box whose rows are the inner dimension: each box holds
// 64 columns, the next box begins `next` bytes further, and 8 rows take 1024 bytes.
__device__ inline uint64_t matrix_descriptor(const void* box, int next) {
  constexpr uint64_t SWIZZLE_128_BYTES = uint64_t{1} << 62, EIGHT_ROWS = uint64_t{1024 >> 4} << 32;
  return SWIZZLE_128_BYTES | EIGHT_ROWS | static_cast<uint64_t>(next >> 4) << 16 |
         (shared_address(box) & 0x3FFFF) >> 4;
}

__device__ inline void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most GROUPS groups of products are pending.
template <int GROUPS>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Orders this thread's accesses to shared memory before later ones of the copy engine.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define RIFT_C8(n)                                                                            \
  "+f"(c[n]), "+f"(c[n + 1]), "+f"(c[n + 2]), "+f"(c[n + 3]), "+f"(c[n + 4]), "+f"(c[n + 5]), \
      "+f"(c[n + 6]), "+f"(c[n + 7])
#define RIFT_C64(n)                                                                               \
  RIFT_C8(n), RIFT_C8(n + 8), RIFT_C8(n + 16), RIFT_C8(n + 24), RIFT_C8(n + 32), RIFT_C8(n + 40), \
      RIFT_C8(n + 48), RIFT_C8(n + 56)
#define RIFT_64_REGISTERS                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RIFT_C_REGISTERS                                                                         \
  "{" RIFT_64_REGISTERS ", "                                                                     \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "

// c += a^T b by a warpgroup: 64 columns of a, 256 of b, 16 rows of both. Warp w holds rows 16 w to
// 16 w + 15 of the result; c[4 n + i] lies in columns 8 n to 8 n + 7, as in a warp's multiply_add.
__device__ inline void multiply_add(float (&c)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred accumulate;\n\tsetp.ne.b32 accumulate, %130, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " RIFT_C_REGISTERS
      "%128, %129, accumulate, 1, 1, 1, 1;\n\t}"
      : RIFT_C64(0), RIFT_C64(64)
      : "l"(a), "l"(b), "r"(1));
}

// The same with 128 columns of b.
__device__ inline void multiply_add(float (&c)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred accumulate;\n\tsetp.ne.b32 accumulate, %66, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RIFT_64_REGISTERS "}, "
      "%64, %65, accumulate, 1, 1, 1, 1;\n\t}"
      : RIFT_C64(0)
      : "l"(a), "l"(b), "r"(1));
}

// c += a b: the same with 64 rows of a, whose 16 columns are the inner dimension.
__device__ inline void multiply_add_rows(float (&c)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred accumulate;\n\tsetp.ne.b32 accumulate, %130, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " RIFT_C_REGISTERS
      "%128, %129, accumulate, 1, 1, 0, 1;\n\t}"
      : RIFT_C64(0), RIFT_C64(64)
      : "l"(a), "l"(b), "r"(1));
}

// The same with a in registers, 16 rows in each warp as in a warp's multiply_add. They must not be
// written before warpgroup_wait.
__device__ inline void multiply_add(float (&c)[128], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred accumulate;\n\tsetp.ne.b32 accumulate, %133, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " RIFT_C_REGISTERS
      "{%128, %129, %130, %131}, %132, accumulate, 1, 1, 1;\n\t}"
      : RIFT_C64(0), RIFT_C64(64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}

#undef RIFT_C8
#undef RIFT_C64
#undef RIFT_64_REGISTERS
#undef RIFT_C_REGISTERS

}  // namespace rift
#endif
