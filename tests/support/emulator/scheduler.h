// Runs the threads of a grid as fibers on a CPU, in an order that reveals missing synchronization.
//
// Warps run one after another. Their order is drawn anew in each round, and so is how long each one
// runs: some instructions, or until it waits for another warp. Warps are not kept in lockstep, not
// even by instructions that their threads execute together. Depending on the seed, a block or a
// warp runs only while all others wait.
#pragma once

#include <random>

#include "grid.h"

namespace emulator {

constexpr size_t STACK = 96 * 1024;
// Rounds without progress after which the grid is stuck. Threads may poll a counter without
// progress, but not for long.
constexpr int IDLE_ROUNDS = 1000;

// Suspends the running fiber.
inline void yield() {
  if (_setjmp(grid->current->suspended) == 0) _longjmp(grid->scheduler, 1);
}

// Runs a fiber until it yields.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(grid->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.suspended, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Returns the generation that the barrier completes when all have arrived.
inline int arrive(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++grid->progress;
  }
  return generation;
}

// Waits until this generation is complete.
inline void wait(Barrier& barrier, int generation) {
  if (barrier.generation != generation) return;
  grid->current->barrier = &barrier;
  grid->current->generation = generation;
  yield();
  grid->current->barrier = nullptr;
}

inline void wait(Barrier& barrier) { wait(barrier, arrive(barrier)); }

// What a fiber executes.
inline void run_thread() {
  try {
    grid->kernel();
    for (const auto& group : grid->current->copies) {
      if (!group.empty()) throw std::runtime_error("a copy was not waited for");
    }
  } catch (const std::exception& error) {
    // An exception cannot leave its fiber.
    grid->error = error.what();
  }
  grid->current->done = true;
  --grid->block().running;
  ++grid->progress;
  yield();
}

class Scheduler {
 public:
  Scheduler(Grid& grid_launch, const GridShape& grid_shape, unsigned grid_seed)
      : launch(grid_launch), shape(grid_shape), seed(grid_seed), random(grid_seed) {
    for (Fiber& fiber : launch.fibers) {
      fiber.stack.reset(new char[STACK]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = STACK;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, run_thread, 0);
    }
  }

  // Runs all threads to their end; throws if they wait for ever.
  void run() {
    // The first thread of each warp.
    std::vector<size_t> warps(launch.fibers.size() / 32);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = 32 * i;
    running = launch.fibers.size();
    long long previous = -1;
    int idle = 0;
    while (running > 0) {
      const bool moving = launch.progress != previous;
      idle = moving ? 0 : idle + 1;
      if (idle > IDLE_ROUNDS) throw std::runtime_error("the threads wait for ever");
      previous = launch.progress;
      std::shuffle(warps.begin(), warps.end(), random);
      make_some_copies();
      for (size_t warp : warps) {
        if (moving && is_starved(launch.fibers[warp])) continue;
        // 1 to 2048 steps; small and large numbers are equally likely.
        int steps = 1 << random() % 12;
        while (steps > 0 && step(warp)) --steps;
      }
    }
  }

 private:
  // One seed in three starves a block of each entry, another one a warp of each block.
  bool is_starved(const Fiber& fiber) const {
    const unsigned victim = seed / 3;
    return (seed % 3 == 1 && fiber.block.x == victim % shape.blocks) ||
           (seed % 3 == 2 && fiber.thread.x / 32 == victim % (shape.threads / 32));
  }

  // Makes half of the copies in flight, drawn at random.
  void make_some_copies() {
    std::shuffle(launch.copies.begin(), launch.copies.end(), random);
    for (size_t i = launch.copies.size() - launch.copies.size() / 2; i > 0; --i) {
      launch.copies.back()();
      launch.copies.pop_back();
      ++launch.progress;
    }
  }

  // Runs each thread of a warp once, beginning with any of them; returns whether there was
  // progress.
  bool step(size_t warp) {
    const long long previous = launch.progress;
    const size_t first = random() % 32;
    for (size_t i = 0; i < 32; ++i) {
      Fiber& fiber = launch.fibers[warp + (first + i) % 32];
      if (!fiber.may_run()) continue;
      launch.current = &fiber;
      threadIdx = fiber.thread;
      blockIdx = fiber.block;
      resume(fiber);
      running -= fiber.done;
      if (!launch.error.empty()) throw std::runtime_error(launch.error);
    }
    return launch.progress != previous;
  }

  Grid& launch;
  const GridShape shape;
  const unsigned seed;
  std::mt19937 random;
  size_t running = 0;  // threads
};

// Runs a kernel. Throws if its threads wait for ever, if a copy is never waited for, or if a block
// writes beyond its shared memory.
inline void run(std::function<void()> kernel, const GridShape& shape, unsigned seed) {
  Grid launch(std::move(kernel), shape);
  grid = &launch;
  gridDim = {shape.blocks, shape.entries, 1};
  blockDim = {shape.threads, 1, 1};
  Scheduler(launch, shape, seed).run();
  if (!launch.copies.empty()) throw std::runtime_error("a copy was not waited for");
  for (const Block& block : launch.blocks) {
    if (!block.shared.is_intact()) {
      throw std::runtime_error("a block wrote beyond its shared memory");
    }
  }
  grid = nullptr;
}

}  // namespace emulator
