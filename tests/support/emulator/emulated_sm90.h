// Hopper's instructions of csrc/common/sm90.cuh on the emulated GPU. What is asynchronous on a GPU
// happens late here: copies some rounds later and in any order, products when they are waited for.
#pragma once

#include <array>

#include "common/primitives.cuh"

namespace rift {

// A row-major matrix of 16-bit elements; it fills the 128 bytes of a CUtensorMap.
struct alignas(64) TensorMap {
  const uint16_t* elements;
  long long stride;
  int rows, columns, box_rows;
  unsigned char padding[100];
};

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory());
}

// As large as an mbarrier: 8 bytes.
struct Mbarrier {
  uint8_t phase, expected, pending, unused;
  int32_t bytes;

  void end_phase() {
    if (pending > 0 || bytes > 0) return;
    if (bytes < 0) throw std::runtime_error("more bytes than a barrier expects");
    phase ^= 1;
    pending = expected;
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline void init_barrier(Mbarrier* barrier, int arrivals) {
  *barrier = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
}

inline void fence_barrier_init() {}

inline void arrive(Mbarrier* barrier) {
  if (barrier->pending == 0) throw std::runtime_error("more arrivals than a barrier expects");
  --barrier->pending;
  barrier->end_phase();
}

inline void arrive_remote(Mbarrier* barrier, int rank) { arrive(remote_address(barrier, rank)); }

inline void arrive_expect_tx(Mbarrier* barrier, int bytes) {
  barrier->bytes += bytes;
  arrive(barrier);
}

inline void wait_barrier(const Mbarrier* barrier, unsigned parity) {
  while (barrier->phase == parity) emulator::yield();
}

// Swizzles an address as the copy engine and WGMMA do: vectors of 16 bytes within 1024 bytes.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Called by the scheduler, outside of any fiber.
inline void copy_now(unsigned char* shared, uint32_t start, const TensorMap& map, int column,
                     int row, Mbarrier* barrier) {
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const bool inside = row + r < map.rows && column + c < map.columns;
      const uint16_t x = inside ? map.elements[(row + r) * map.stride + column + c] : 0;
      const uint32_t address = start + static_cast<uint32_t>(r * 128 + c * 2);
      std::memcpy(shared + swizzled(address), &x, 2);
    }
  }
  barrier->bytes -= map.box_rows * 128;
  // The other block of a cluster may send bytes before this block expects them.
  if (barrier->bytes < 0 && barrier->pending == 0) {
    throw std::runtime_error("more bytes than a barrier expects");
  }
  barrier->end_phase();
}

inline void copy_box_to(int rank, void* target, const TensorMap* map, int column, int row,
                        Mbarrier* barrier) {
  if (shared_address(target) % 1024 != 0) throw std::runtime_error("a box is misaligned");
  unsigned char* shared = emulator::grid->neighbour(rank).shared.bytes.get();
  const uint32_t start = shared_address(target);
  const TensorMap source = *map;
  Mbarrier* remote = remote_address(barrier, rank);
  emulator::grid->copies.push_back([=] { copy_now(shared, start, source, column, row, remote); });
}

inline void copy_box(void* target, const TensorMap* map, int column, int row, Mbarrier* barrier) {
  copy_box_to(emulator::grid->rank(), target, map, column, row, barrier);
}

inline void copy_box_multicast(void* target, const TensorMap* map, int column, int row,
                               Mbarrier* barrier) {
  for (int rank = 0; rank < 2; ++rank) copy_box_to(rank, target, map, column, row, barrier);
}

inline int uniform(int x) { return x; }

inline void deallocate_registers() {}
inline void allocate_registers() {}

inline void prefetch_tensor_map(const TensorMap*) {}

inline uint64_t matrix_descriptor(const void* box, int next) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(next >> 4) << 16 |
         (shared_address(box) & 0x3FFFF) >> 4;
}

inline void warpgroup_fence() {}

inline void warpgroup_commit() { emulator::grid->current->products.emplace_back(); }

template <int GROUPS>
void warpgroup_wait() {
  emulator::complete(emulator::grid->current->products, GROUPS);
}

inline void fence_async_proxy() {}

// The bfloat16 at an address before swizzling.
inline float swizzled_element(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, shared_memory() + swizzled(address), 2);
  return bits_to_float(uint32_t{bits} << 16);
}

// The fields of an operand's descriptor, in bytes.
struct Descriptor {
  uint32_t start, next_box, eight_rows;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) << 4),
        next_box((bits >> 16 & 0x3FFF) << 4),
        eight_rows((bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) throw std::runtime_error("operands must have swizzled rows of 128 bytes");
  }
};

// Element (row, inner) of an operand whose columns are the inner dimension.
inline float row_operand(uint64_t bits, int row, int inner) {
  const Descriptor operand(bits);
  return swizzled_element(operand.start + row / 8 * operand.eight_rows + row % 8 * 128 + inner * 2);
}

// Element (inner, column) of an operand whose rows are the inner dimension.
inline float column_operand(uint64_t bits, int inner, int column) {
  const Descriptor operand(bits);
  return swizzled_element(operand.start + column / 64 * operand.next_box +
                          inner / 8 * operand.eight_rows + inner % 8 * 128 + column % 64 * 2);
}

// Multiplies at once, with 2 * SIZE columns of b. `left(half, k)` returns element k of this
// thread's two rows of the left operand.
template <int SIZE, typename Left>
void multiply_now(float* c, Left left, uint64_t b) {
  const int lane = threadIdx.x % 32;
  double rows[2][16], column[16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) rows[half][k] = left(half, k);
  }
  for (int n = 0; n < SIZE / 4; ++n) {
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 16; ++k) column[k] = column_operand(b, k, 8 * n + lane % 4 * 2 + i);
      for (int half = 0; half < 2; ++half) {
        float& sum = c[4 * n + 2 * half + i];
        sum = emulator::add_products<16>(sum, [&](int k) { return rows[half][k] * column[k]; });
      }
    }
  }
}

// Multiplies when it is waited for. All 128 threads of the warpgroup must take part.
template <int SIZE, typename Left>
void multiply_later(float (&c)[SIZE], Left left, uint64_t b) {
  emulator::wait(emulator::grid->block().warpgroups[threadIdx.x / 128]);
  float* sums = c;
  emulator::grid->current->products.back().push_back([=] { multiply_now<SIZE>(sums, left, b); });
}

inline int first_row() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

template <int SIZE>
void multiply_add(float (&c)[SIZE], uint64_t a, uint64_t b) {
  multiply_later(
      c, [=](int half, int k) { return column_operand(a, k, first_row() + 8 * half); }, b);
}

inline void multiply_add_rows(float (&c)[128], uint64_t a, uint64_t b) {
  multiply_later(c, [=](int half, int k) { return row_operand(a, first_row() + 8 * half, k); }, b);
}

inline void multiply_add(float (&c)[128], const uint32_t (&a)[4], uint64_t b) {
  emulator::Warp& warp = emulator::grid->warp();
  const unsigned lane = threadIdx.x % 32;
  std::array<std::array<uint32_t, 4>, 32> registers;
  std::copy(a, a + 4, warp.a[lane]);
  emulator::wait(warp.barrier);
  for (int other = 0; other < 32; ++other) std::copy_n(warp.a[other], 4, registers[other].begin());
  emulator::wait(warp.barrier);
  multiply_later(
      c,
      [=](int half, int k) {
        const uint32_t pair = registers[lane / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
        return pair_element(pair, static_cast<unsigned>(k % 2));
      },
      b);
}

}  // namespace rift
