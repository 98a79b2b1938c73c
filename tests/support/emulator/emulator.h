// A GPU for csrc on a CPU: every thread of a grid is a fiber, and the instructions of
// csrc/common/primitives.cuh do what the PTX manual says. Warps run one after another, in an order drawn anew
// each round, for a while that is drawn, too: some instructions, or until they wait for another warp.
// Nothing that the threads of a warp do together keeps warps in step; and by the seed a block or a warp
// runs only while all others wait. So a missing barrier shows.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor_cores.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

namespace emulator {

// Those who wait for the same thing.
struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

// Memory that begins at a multiple of 1024 bytes, as a block's does.
struct Shared {
  static constexpr std::align_val_t ALIGNMENT{1024};
  struct Free {
    void operator()(unsigned char* bytes) const { ::operator delete[](bytes, ALIGNMENT); }
  };
  std::unique_ptr<unsigned char[], Free> bytes;
  size_t size = 0;

  // NaN wherever it is read before it is written, and a guard behind it, to be found as it was.
  void make(size_t wanted);
  bool is_intact() const;
};

struct Warp {
  Barrier barrier;
  const void* address[32];
  double value[32];
  uint32_t a[32][4], b[32][2];
};

struct Block {
  Barrier barrier;
  unsigned running = 0;  // threads
  Shared shared;
  std::vector<Warp> warps;
  // Of 128 threads each, for the products that they make together.
  std::vector<Barrier> warpgroups;
  // The named barrier of those that multiply.
  Barrier multipliers;
};

// Work that a thread has started and not waited for: the newest group is still open.
using Groups = std::vector<std::vector<std::function<void()>>>;

// Does all groups but the last ones.
inline void finish(Groups& groups, size_t left) {
  while (groups.size() > left + 1) {
    for (const auto& work : groups.front()) work();
    groups.erase(groups.begin());
  }
}

struct Fiber {
  // Where it begins, and where it has left off: swapcontext() would ask the kernel each time.
  ucontext_t start;
  std::jmp_buf place;
  bool started = false;
  Groups products{1}, fetched{1};
  std::unique_ptr<char[]> stack;
  Index thread, block;
  bool done = false;
  // What it waits for, and since when; none where it asks again and again.
  const Barrier* barrier = nullptr;
  int generation = 0;
  // Whether a fence stands behind its last barrier; whether none does yet behind its last atomic.
  bool fenced = false, told = false;

  bool may_run() const { return !done && !(barrier && barrier->generation == generation); }
};

constexpr size_t STACK = 96 * 1024;
constexpr size_t GUARD = 256;
constexpr unsigned char GUARD_BYTE = 0xA5;

inline void Shared::make(size_t wanted) {
  size = wanted;
  bytes.reset(static_cast<unsigned char*>(::operator new[](size + GUARD, ALIGNMENT)));
  std::fill_n(bytes.get(), size, static_cast<unsigned char>(0xFF));
  std::fill_n(bytes.get() + size, GUARD, GUARD_BYTE);
}

inline bool Shared::is_intact() const {
  return std::all_of(bytes.get() + size, bytes.get() + size + GUARD,
                     [](unsigned char byte) { return byte == GUARD_BYTE; });
}

struct Grid {
  std::vector<Block> blocks;
  std::vector<Barrier> clusters;  // of neighbours in a row of blocks
  unsigned cluster_size = 1;
  std::vector<Fiber> fibers;
  std::jmp_buf scheduler;
  Fiber* current = nullptr;
  long long progress = 0;  // barriers passed and fibers done
  std::function<void()> kernel;
  // Copies under way, each done some rounds later.
  std::vector<std::function<void()>> copies;
  std::string error;

  Block& block() { return blocks[blockIdx.y * gridDim.x + blockIdx.x]; }
  // Of the running block's cluster.
  Block& neighbour(int rank) {
    const unsigned first = blockIdx.x / cluster_size * cluster_size;
    Block& block = blocks[blockIdx.y * gridDim.x + first + static_cast<unsigned>(rank)];
    if (block.running == 0) throw std::runtime_error("the memory of a block that has left");
    return block;
  }
  int rank() const { return static_cast<int>(blockIdx.x % cluster_size); }
  Barrier& cluster() { return clusters[(blockIdx.y * gridDim.x + blockIdx.x) / cluster_size]; }
  Warp& warp() { return block().warps[threadIdx.x / 32]; }
};

inline Grid* grid = nullptr;

inline void yield() {
  if (_setjmp(grid->current->place) == 0) _longjmp(grid->scheduler, 1);
}

// Runs a fiber until it yields.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(grid->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++grid->progress;
    return;
  }
  grid->current->barrier = &barrier;
  grid->current->generation = generation;
  yield();
  grid->current->barrier = nullptr;
}

inline void enter() {
  try {
    grid->kernel();
    for (const auto& group : grid->current->fetched) {
      if (!group.empty()) throw std::runtime_error("a copy was not waited for");
    }
  } catch (const std::exception& error) {
    // It cannot leave its fiber.
    grid->error = error.what();
  }
  grid->current->done = true;
  --grid->block().running;
  ++grid->progress;
  yield();
}

// Runs the kernel; throws where fibers wait for ever or write behind their shared memory. A cluster is
// a row of blocks, or so many of them.
inline void run(std::function<void()> kernel, unsigned blocks, unsigned entries, unsigned threads,
                size_t shared_bytes, unsigned seed, unsigned cluster_size = 0) {
  Grid all;
  grid = &all;
  all.kernel = std::move(kernel);
  gridDim = {blocks, entries, 1};
  blockDim = {threads, 1, 1};
  all.blocks.resize(blocks * entries);
  all.cluster_size = cluster_size ? cluster_size : blocks;
  all.clusters.resize(blocks * entries / all.cluster_size);
  for (Barrier& cluster : all.clusters) {
    cluster.expected = static_cast<int>(all.cluster_size * threads);
  }
  for (Block& block : all.blocks) {
    block.barrier.expected = static_cast<int>(threads);
    block.running = threads;
    block.shared.make(shared_bytes);
    block.warpgroups.resize((threads + 127) / 128);
    block.multipliers.expected = 256;
    for (Barrier& group : block.warpgroups) group.expected = 128;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
  }
  all.fibers.resize(static_cast<size_t>(blocks) * entries * threads);
  for (size_t i = 0; i < all.fibers.size(); ++i) {
    Fiber& fiber = all.fibers[i];
    fiber.thread.x = static_cast<unsigned>(i % threads);
    fiber.block.x = static_cast<unsigned>(i / threads % blocks);
    fiber.block.y = static_cast<unsigned>(i / threads / blocks);
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  // The first thread of each warp.
  std::vector<size_t> warps(all.fibers.size() / 32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = 32 * i;
  std::mt19937 random(seed);
  // Of three seeds, the second starves a block of each entry, the third a warp of each block.
  const unsigned victim = seed / 3;
  const auto starves = [&](const Fiber& fiber) {
    return (seed % 3 == 1 && fiber.block.x == victim % blocks) ||
           (seed % 3 == 2 && fiber.thread.x / 32 == victim % (threads / 32));
  };
  size_t left = all.fibers.size();
  // Runs each thread of a warp once, from any of them on; whether that was of any use.
  const auto step = [&](size_t warp) {
    const long long since = all.progress;
    const size_t from = random() % 32;
    for (size_t i = 0; i < 32; ++i) {
      Fiber& fiber = all.fibers[warp + (from + i) % 32];
      if (!fiber.may_run()) continue;
      all.current = &fiber;
      threadIdx = fiber.thread;
      blockIdx = fiber.block;
      resume(fiber);
      left -= fiber.done;
      if (!all.error.empty()) throw std::runtime_error(all.error);
    }
    return all.progress != since;
  };
  long long before = -1;
  int idle = 0;
  while (left > 0) {
    const bool moving = all.progress != before;
    // Counters may be waited for without progress, but not for long.
    idle = moving ? 0 : idle + 1;
    if (idle > 1000) throw std::runtime_error("the fibers wait for ever");
    before = all.progress;
    std::shuffle(warps.begin(), warps.end(), random);
    std::shuffle(all.copies.begin(), all.copies.end(), random);
    for (size_t some = all.copies.size() - all.copies.size() / 2; some > 0; --some) {
      all.copies.back()();
      all.copies.pop_back();
      ++all.progress;
    }
    for (size_t warp : warps) {
      if (moving && starves(all.fibers[warp])) continue;
      // 1 to 2048 steps, as often few as many.
      int steps = 1 << random() % 12;
      while (steps > 0 && step(warp)) --steps;
    }
  }
  if (!all.copies.empty()) throw std::runtime_error("a copy was not waited for");
  for (const Block& block : all.blocks) {
    if (!block.shared.is_intact()) {
      throw std::runtime_error("a block wrote behind its shared memory");
    }
  }
  grid = nullptr;
}

}  // namespace emulator

// What one thread tells another block of its own block's writes, and what it is told for its block:
// by the letter of PTX's memory model, fences stand between the barrier and the atomic, on either side.
inline void __syncthreads() {
  emulator::Fiber& fiber = *emulator::grid->current;
  if (fiber.told) throw std::runtime_error("no fence between an atomic and the barrier behind it");
  fiber.fenced = false;
  emulator::wait(emulator::grid->block().barrier);
}
inline void __syncwarp() { emulator::wait(emulator::grid->warp().barrier); }
inline void __threadfence() {
  emulator::grid->current->fenced = true;
  emulator::grid->current->told = false;
}

template <typename T>
T __shfl_xor_sync(unsigned, T x, int lane_mask) {
  emulator::Warp& warp = emulator::grid->warp();
  warp.value[threadIdx.x % 32] = static_cast<double>(x);
  emulator::wait(warp.barrier);
  const T result =
      static_cast<T>(warp.value[(threadIdx.x % 32) ^ static_cast<unsigned>(lane_mask)]);
  emulator::wait(warp.barrier);
  return result;
}

inline unsigned atomicAdd(unsigned* counter, unsigned more) {
  emulator::Fiber& fiber = *emulator::grid->current;
  if (!fiber.fenced)
    throw std::runtime_error("no fence between an atomic and the barrier before it");
  fiber.told = true;
  const unsigned before = *counter;
  *counter += more;
  return before;
}

namespace rift {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The same bits as another type: C++20 has it as std::bit_cast.
template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float bits_to_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t float_to_bits(float x) { return bits_as<uint32_t>(x); }

inline uint16_t round_to_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = float_to_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint32_t round_to_bf16_pair(float first, float second) {
  return round_to_bf16(first) | uint32_t{round_to_bf16(second)} << 16;
}

inline uint16_t round_to_half(float x) { return bits_as<uint16_t>(static_cast<_Float16>(x)); }
inline float half_to_float(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }

inline unsigned char* shared_memory() { return emulator::grid->block().shared.bytes.get(); }

inline void load_any(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("a row is misaligned");
  emulator::Warp& warp = emulator::grid->warp();
  const unsigned lane = threadIdx.x % 32;
  warp.address[lane] = row;
  emulator::wait(warp.barrier);
  for (unsigned m = 0; m < 4; ++m) {
    // The eight rows of a matrix are read at once, from banks of 16 bytes, if no two share one.
    unsigned banks = 0;
    for (unsigned i = 0; i < 8; ++i) {
      banks |= 1u << reinterpret_cast<uintptr_t>(warp.address[m * 8 + i]) / 16 % 8;
    }
    if (banks != 0xFF) throw std::runtime_error("rows of a matrix lie in the same bank");
    uint32_t pair = 0;
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned g = lane / 4, t = 2 * (lane % 4) + i;
      const unsigned from = transposed ? t : g, column = transposed ? g : t;
      const auto* elements = static_cast<const uint16_t*>(warp.address[m * 8 + from]);
      pair |= uint32_t{elements[column]} << (16 * i);
    }
    r[m] = pair;
  }
  emulator::wait(warp.barrier);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { load_any(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_any(r, row, true); }

// Made when it is waited for, and till then there is NaN: so it shows who reads too early, and who had
// not read yet.
inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    throw std::runtime_error("a copy of 16 bytes is misaligned");
  }
  std::memset(to, 0xFF, 16);
  emulator::grid->current->fetched.back().push_back([=] {
    std::memset(to, 0, 16);
    std::memcpy(to, from, static_cast<size_t>(bytes));
  });
}

inline void commit_copies() { emulator::grid->current->fetched.emplace_back(); }

template <int GROUPS>
void wait_copies() {
  emulator::finish(emulator::grid->current->fetched, GROUPS);
}

inline float half_of(uint32_t pair, unsigned which) {
  return bits_to_float((which ? pair >> 16 : pair & 0xFFFF) << 16);
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Warp& warp = emulator::grid->warp();
  const unsigned lane = threadIdx.x % 32;
  std::copy(a, a + 4, warp.a[lane]);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  emulator::wait(warp.barrier);
  for (unsigned part = 0; part < 4; ++part) {
    const unsigned g = lane / 4, row = g + part / 2 * 8, column = 2 * (lane % 4) + part % 2;
    c[part] = emulator::add_products<8>(c[part], [&](int product) {
      // Who holds a(row, k) and b(k, column).
      const auto k = static_cast<unsigned>(product);
      const uint32_t left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
      return static_cast<double>(half_of(left, k % 2)) * static_cast<double>(half_of(right, k % 2));
    });
  }
  emulator::wait(warp.barrier);
}

inline const float* map_to_rank(const float* mine, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(mine) - shared_memory();
  const emulator::Block& block = emulator::grid->neighbour(rank);
  return reinterpret_cast<const float*>(block.shared.bytes.get() + offset);
}

inline void cluster_barrier() { emulator::wait(emulator::grid->cluster()); }

inline unsigned load_acquire(const unsigned* counter) {
  emulator::yield();
  return *counter;
}

}  // namespace rift
