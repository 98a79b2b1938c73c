// The threads and memory of a launch on the emulated GPU; scheduler.h runs them.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

constexpr size_t GUARD = 256;
constexpr unsigned char GUARD_BYTE = 0xA5;

// A block's shared memory; it begins at a multiple of 1024 bytes, as on a GPU.
struct SharedMemory {
  static constexpr std::align_val_t ALIGNMENT{1024};
  struct Free {
    void operator()(unsigned char* bytes) const { ::operator delete[](bytes, ALIGNMENT); }
  };
  std::unique_ptr<unsigned char[], Free> bytes;
  size_t size = 0;

  // Fills the memory with NaN, which shows reads before writes, and appends a guard.
  void allocate(size_t byte_count) {
    size = byte_count;
    bytes.reset(static_cast<unsigned char*>(::operator new[](size + GUARD, ALIGNMENT)));
    std::fill_n(bytes.get(), size, static_cast<unsigned char>(0xFF));
    std::fill_n(bytes.get() + size, GUARD, GUARD_BYTE);
  }

  // Whether nothing was written beyond its end.
  bool is_intact() const {
    return std::all_of(bytes.get() + size, bytes.get() + size + GUARD,
                       [](unsigned char byte) { return byte == GUARD_BYTE; });
  }
};

// What the lanes of a warp exchange.
struct Warp {
  Barrier barrier;
  const void* address[32];
  double value[32];
  uint32_t a[32][4], b[32][2];
};

struct Block {
  Barrier barrier;
  unsigned running = 0;  // threads that have not exited
  SharedMemory shared;
  std::vector<Warp> warps;
  std::vector<Barrier> warpgroups;
};

// Asynchronous work of a thread in groups, of which the last is still open.
using AsyncGroups = std::vector<std::vector<std::function<void()>>>;

// Completes groups until at most `pending` closed ones are left.
inline void complete(AsyncGroups& groups, size_t pending) {
  while (groups.size() > pending + 1) {
    for (const auto& work : groups.front()) work();
    groups.erase(groups.begin());
  }
}

// A thread of the grid.
struct Fiber {
  // The context in which it starts, and the one in which it was suspended. Switches use longjmp,
  // because swapcontext makes a system call each time.
  ucontext_t start;
  std::jmp_buf suspended;
  bool started = false;
  AsyncGroups products{1}, copies{1};
  std::unique_ptr<char[]> stack;
  Index thread, block;
  bool done = false;
  // The barrier for which it waits, and the generation in which it arrived; null while it may run.
  const Barrier* barrier = nullptr;
  int generation = 0;
  int cluster_generation = 0;  // in which it arrived at the cluster's barrier
  // Whether a fence follows its last barrier, and whether its last atomic still needs one.
  bool fenced = false, needs_fence = false;

  bool may_run() const { return !done && !(barrier && barrier->generation == generation); }
};

struct GridShape {
  unsigned blocks, entries, threads;
  size_t shared_bytes;
  unsigned cluster_size;  // 0: all blocks with the same blockIdx.y

  unsigned cluster() const { return cluster_size ? cluster_size : blocks; }
};

struct Grid {
  std::function<void()> kernel;
  std::vector<Block> blocks;
  std::vector<Barrier> clusters;
  unsigned cluster_size;
  std::vector<Fiber> fibers;
  std::jmp_buf scheduler;
  Fiber* current = nullptr;
  long long progress = 0;  // barriers and copies completed, and threads that have exited
  // Copies in flight, each made some rounds later.
  std::vector<std::function<void()>> copies;
  std::string error;

  Grid(std::function<void()> function, const GridShape& shape)
      : kernel(std::move(function)),
        blocks(shape.blocks * shape.entries),
        clusters(shape.blocks * shape.entries / shape.cluster()),
        cluster_size(shape.cluster()),
        fibers(static_cast<size_t>(shape.blocks) * shape.entries * shape.threads) {
    for (Barrier& cluster : clusters) {
      cluster.expected = static_cast<int>(cluster_size * shape.threads);
    }
    for (Block& block : blocks) {
      block.barrier.expected = static_cast<int>(shape.threads);
      block.running = shape.threads;
      block.shared.allocate(shape.shared_bytes);
      block.warpgroups.resize((shape.threads + 127) / 128);
      for (Barrier& warpgroup : block.warpgroups) warpgroup.expected = 128;
      block.warps.resize(shape.threads / 32);
      for (Warp& warp : block.warps) warp.barrier.expected = 32;
    }
    for (size_t i = 0; i < fibers.size(); ++i) {
      fibers[i].thread.x = static_cast<unsigned>(i % shape.threads);
      fibers[i].block.x = static_cast<unsigned>(i / shape.threads % shape.blocks);
      fibers[i].block.y = static_cast<unsigned>(i / shape.threads / shape.blocks);
    }
  }

  // The block, warp, cluster and cluster rank of the running thread.
  Block& block() { return blocks[blockIdx.y * gridDim.x + blockIdx.x]; }
  Warp& warp() { return block().warps[threadIdx.x / 32]; }
  Barrier& cluster() { return clusters[(blockIdx.y * gridDim.x + blockIdx.x) / cluster_size]; }
  int rank() const { return static_cast<int>(blockIdx.x % cluster_size); }

  // The block of its cluster with this rank, whose shared memory it accesses.
  Block& neighbour(int rank) {
    const unsigned first = blockIdx.x / cluster_size * cluster_size;
    Block& block = blocks[blockIdx.y * gridDim.x + first + static_cast<unsigned>(rank)];
    if (block.running == 0) throw std::runtime_error("access to a block that has exited");
    return block;
  }
};

// The launch that is running.
inline Grid* grid = nullptr;

}  // namespace emulator
