// Raw second moments of [X | Y] on Hopper: X^T X, Y^T Y (upper tiles) and X^T Y, bfloat16 in float32.
//
// One block a processor owns a run of the schedule. One thread of its first warpgroup fetches
// chunks of columns by the copy engine, as they lie; the two other warpgroups multiply them, half of
// a tile's rows each: both operands have their inner dimension as rows, which the tensor cores take.
// Means come off later: products of bfloat16 are exact in float32.
//
// Bytes: 128 columns of either side a tile, from the L2 cache where they fit (of a tile on the
// diagonal once); 64 KiB for each part of a tile.
#pragma once

#include "moments_sm90_layout.h"
#include "sm90.cuh"
#include "types.cuh"

namespace rift {

struct Pipeline {
  unsigned char* stages;
  Mbarrier *full, *empty;

  __device__ unsigned char* left(int stage) const { return stages + stage * STAGE_BYTES; }
  __device__ unsigned char* right(int stage) const { return left(stage) + OPERAND_BYTES; }
};

// Where a program is in the ring of stages, and how often it has been round.
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  __device__ void next() {
    if (++stage == MOMENT_STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ inline void fetch(const MomentsArguments& arguments, const TensorMap* x,
                             const TensorMap* y, const Pipeline& pipeline, int program) {
  const Schedule& schedule = arguments.schedule;
  Turn turn;
  for (int at = schedule.begin(program); at < schedule.begin(program + 1);) {
    const Piece piece = schedule.piece(program, at);
    const MomentTile tile = schedule.tile(piece.slot);
    const TensorMap* left = tile.left_is_y ? y : x;
    const TensorMap* right = tile.right_is_y ? y : x;
    const bool once = on_diagonal(tile);
    for (int chunk = piece.first; chunk < piece.last; ++chunk, turn.next()) {
      // At first nobody has to make room.
      wait_barrier(pipeline.empty + turn.stage, turn.parity ^ 1);
      Mbarrier* full = pipeline.full + turn.stage;
      arrive_and_expect(full, once ? OPERAND_BYTES : STAGE_BYTES);
      for (int box = 0; box < MOMENT_BLOCK / BOX_COLUMNS; ++box) {
        copy_box(pipeline.left(turn.stage) + box * BOX_BYTES, left,
                 tile.i * MOMENT_BLOCK + box * BOX_COLUMNS, chunk * MOMENT_CHUNK, full);
        if (once) continue;
        copy_box(pipeline.right(turn.stage) + box * BOX_BYTES, right,
                 tile.j * MOMENT_BLOCK + box * BOX_COLUMNS, chunk * MOMENT_CHUNK, full);
      }
    }
    at += piece.last - piece.first;
  }
}

// `half`: which 64 rows of every tile this warpgroup has.
__device__ inline void multiply(const MomentsArguments& arguments, const Pipeline& pipeline,
                                int program, int half) {
  const Schedule& schedule = arguments.schedule;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  Turn turn;
  for (int at = schedule.begin(program); at < schedule.begin(program + 1);) {
    const Piece piece = schedule.piece(program, at);
    const bool once = on_diagonal(schedule.tile(piece.slot));
    float c[64] = {};
    int before = -1;
    for (int chunk = piece.first; chunk < piece.last; ++chunk, turn.next()) {
      wait_barrier(pipeline.full + turn.stage, turn.parity);
      const unsigned char* left = pipeline.left(turn.stage);
      const uint64_t a = describe(left + half * BOX_BYTES, BOX_BYTES);
      const uint64_t b = describe(once ? left : pipeline.right(turn.stage), BOX_BYTES);
      begin_products();
#pragma unroll
      for (int step = 0; step < MOMENT_CHUNK / 16; ++step) {
        // 16 rows of 128 bytes further, in the descriptor's units of 16 bytes.
        multiply_add(c, a + step * (16 * 128 / 16), b + step * (16 * 128 / 16));
      }
      commit_products();
      // The chunk before is through; this one goes on while the next is waited for.
      wait_products<1>();
      if (before >= 0 && lane == 0) arrive(pipeline.empty + before);
      before = turn.stage;
    }
    wait_products<0>();
    if (lane == 0) arrive(pipeline.empty + before);
    float* out = piece.first == 0
                     ? arguments.tiles + static_cast<long long>(piece.slot) * MOMENT_TILE
                     : arguments.spill + static_cast<long long>(program) * MOMENT_TILE;
    out += (half * 64 + warp * 16 + lane / 4) * MOMENT_BLOCK + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      *reinterpret_cast<Vector<float, 2>*>(out + 8 * n) = {c[4 * n], c[4 * n + 1]};
      *reinterpret_cast<Vector<float, 2>*>(out + 8 * MOMENT_BLOCK + 8 * n) = {c[4 * n + 2],
                                                                             c[4 * n + 3]};
    }
    at += piece.last - piece.first;
  }
}

__device__ inline void run_moments(const MomentsArguments& arguments, const TensorMap* x,
                                   const TensorMap* y) {
  // Swizzled boxes begin at multiples of 1024 bytes.
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  auto* barriers = reinterpret_cast<Mbarrier*>(memory + MOMENT_STAGES * STAGE_BYTES);
  const Pipeline pipeline{memory, barriers, barriers + MOMENT_STAGES};
  if (threadIdx.x == 0) {
    prefetch(x);
    prefetch(y);
    for (int stage = 0; stage < MOMENT_STAGES; ++stage) {
      init_barrier(pipeline.full + stage, 1);
      // A thread of each warp that multiplies.
      init_barrier(pipeline.empty + stage, 8);
    }
    fence_barriers();
  }
  __syncthreads();
  const int group = threadIdx.x / 128, program = blockIdx.x;
  if (group == 0) {
    if (threadIdx.x == 0) fetch(arguments, x, y, pipeline, program);
  } else {
    multiply(arguments, pipeline, program, group - 1);
  }
}

__global__ void __launch_bounds__(MOMENT_THREADS, 1)
    moments_sm90_kernel(const __grid_constant__ MomentsArguments arguments,
                        const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y) {
#if defined(RIFT_EMULATOR) || __CUDA_ARCH_FEAT_SM90_ALL
  run_moments(arguments, &x, &y);
#endif
}

}  // namespace rift
