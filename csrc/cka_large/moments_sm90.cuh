// Raw second moments of [X | Y] on Hopper: the tiles of [X Y]^T [X Y] on and above the diagonal,
// bfloat16 in float32.
//
// A cluster of two blocks, one a processor, owns a run of the schedule: squares of 256 x 256, 128 rows
// of them a block. One thread of a block's first warpgroup fetches chunks of columns by the copy
// engine, as they lie: the block's own left operand, and half of the right one, for both blocks. The
// two other warpgroups multiply 64 x 256 each: both operands have their inner dimension as rows,
// which the tensor cores take. Means come off later: products of bfloat16 are exact in float32, and
// sums of runs nearly so (runs.cuh).
//
// Bytes: from the L2 cache 32 KiB a block and chunk for 128 x 256 sums of 64 products, half of it on
// the diagonal; 64 KiB for each part of a tile.
#pragma once

#include "cka_large/moments_layout.h"
#include "cka_large/runs.cuh"
#include "common/elements.cuh"
#include "common/pipeline_state.h"
#include "common/sm90.cuh"

namespace rift {

struct Pipeline {
  unsigned char* stages;
  Mbarrier *full, *empty;

  __device__ unsigned char* right(int stage) const { return stages + stage * STAGE_BYTES; }
  __device__ unsigned char* left(int stage) const {
    return right(stage) + CLUSTER_SIZE * OPERAND_BYTES;
  }
};

// The blocks of columns of a square's first tile.
__device__ inline TileCoord first_tile(int square) {
  const TileCoord pair = tile_coord(square);
  return {pair.i * CLUSTER_SIZE, pair.j * CLUSTER_SIZE};
}

struct MomentMaps {
  TensorMap x, y, patch_x, patch_y;
};

struct Moments {
  const MomentsArguments& arguments;
  const MomentMaps& maps;
  Pipeline pipeline;
  int program, rank;

  // 128 columns of a chunk; beyond the last ones, zeros.
  __device__ void fetch_block(unsigned char* to, int block, int chunk, int patch, bool for_both,
                              Mbarrier* full) const {
    const bool is_y = block >= arguments.schedule.blocks_x;
    const TensorMap* map = is_y ? &maps.y : &maps.x;
    if (patch >= 0) map = is_y ? &maps.patch_y : &maps.patch_x;
    const int row = (patch < 0 ? chunk : patch) * MOMENT_CHUNK;
    const int column = (is_y ? block - arguments.schedule.blocks_x : block) * MOMENT_BLOCK;
#pragma unroll
    for (int box = 0; box < MOMENT_BLOCK / BOX_COLUMNS; ++box) {
      unsigned char* at = to + box * BOX_BYTES;
      if (for_both) {
        copy_box_multicast(at, map, column + box * BOX_COLUMNS, row, full);
      } else {
        copy_box(at, map, column + box * BOX_COLUMNS, row, full);
      }
    }
  }

  __device__ void fetch() const {
    PipelineState<MOMENT_STAGES> state;
    for (int index = 0;; ++index) {
      const Piece piece = arguments.schedule.piece(program, index);
      if (piece.first == piece.last) return;
      const TileCoord tile = first_tile(piece.square);
      const bool diagonal = tile.i == tile.j;
      for (int chunk = piece.first; chunk < piece.last; ++chunk, state.advance()) {
        // At first nobody has to make room; later, both blocks.
        wait_barrier(pipeline.empty + state.stage, state.parity ^ 1);
        Mbarrier* full = pipeline.full + state.stage;
        arrive_expect_tx(full, diagonal ? CLUSTER_SIZE * OPERAND_BYTES : STAGE_BYTES);
        const int patch = arguments.patch_index(chunk);
        fetch_block(pipeline.right(state.stage) + rank * OPERAND_BYTES, tile.j + rank, chunk, patch,
                    true, full);
        if (!diagonal) {
          fetch_block(pipeline.left(state.stage), tile.i + rank, chunk, patch, false, full);
        }
      }
    }
  }

  // `half`: which 64 rows of its block this warpgroup has.
  __device__ void multiply(int half) const {
    PipelineState<MOMENT_STAGES> state;
    for (int index = 0;; ++index) {
      const Piece piece = arguments.schedule.piece(program, index);
      if (piece.first == piece.last) return;
      const TileCoord tile = first_tile(piece.square);
      float c[128] = {};
      Totals<128> totals;
      const int count = piece.last - piece.first;
      for (int done = 0; done < count;) {
        const int run = next_run(done, count - done);
        multiply_run(c, run, tile, half, state);
        done += run;
        totals.end_run(c, done, next_run(done, count - done));
      }
      store(c, totals, {tile.i + rank, tile.j}, piece, half);
    }
  }

  // Some chunks, with nothing under way before and behind.
  __device__ void multiply_run(float (&c)[128], int chunks, TileCoord tile, int half,
                               PipelineState<MOMENT_STAGES>& state) const {
    const int lane = threadIdx.x % 32;
    int before = -1;
    for (int chunk = 0; chunk < chunks; ++chunk, state.advance()) {
      wait_barrier(pipeline.full + state.stage, state.parity);
      const unsigned char* right = pipeline.right(state.stage);
      const unsigned char* left =
          tile.i == tile.j ? right + rank * OPERAND_BYTES : pipeline.left(state.stage);
      const uint64_t a = matrix_descriptor(left + half * BOX_BYTES, BOX_BYTES);
      const uint64_t b = matrix_descriptor(right, BOX_BYTES);
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < MOMENT_CHUNK / 16; ++step) {
        // 16 rows of 128 bytes further, in the descriptor's units of 16 bytes.
        multiply_add(c, a + step * (16 * 128 / 16), b + step * (16 * 128 / 16));
      }
      warpgroup_commit();
      // The chunk before is through; this one goes on while the next is waited for.
      warpgroup_wait<1>();
      if (before >= 0 && lane < CLUSTER_SIZE) arrive_remote(pipeline.empty + before, lane);
      before = state.stage;
    }
    warpgroup_wait<0>();
    if (lane < CLUSTER_SIZE) arrive_remote(pipeline.empty + before, lane);
  }

  __device__ void store(const float (&c)[128], const Totals<128>& totals, TileCoord tile,
                        const Piece& piece, int half) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int across = 0; across < CLUSTER_SIZE; ++across) {
      const TileCoord at{tile.i, tile.j + across};
      // Below the diagonal, or no such columns.
      if (at.i > at.j || at.j >= arguments.schedule.blocks()) continue;
      float* out = arguments.part_address(at, piece.square, piece.part);
      out += (half * 64 + warp * 16 + lane / 4) * MOMENT_BLOCK + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int from = 4 * (16 * across + n);
        *reinterpret_cast<Vector<float, 2>*>(out + 8 * n) = {totals.sum(c, from),
                                                             totals.sum(c, from + 1)};
        *reinterpret_cast<Vector<float, 2>*>(out + 8 * MOMENT_BLOCK + 8 * n) = {
            totals.sum(c, from + 2), totals.sum(c, from + 3)};
      }
    }
  }
};

__device__ inline void run_moments(const MomentsArguments& arguments, const MomentMaps& maps) {
  // Swizzled boxes begin at multiples of 1024 bytes, of both blocks at the same ones.
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  auto* barriers = reinterpret_cast<Mbarrier*>(memory + MOMENT_STAGES * STAGE_BYTES);
  const Pipeline pipeline{memory, barriers, barriers + MOMENT_STAGES};
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.x);
    prefetch_tensor_map(&maps.y);
    for (int stage = 0; stage < MOMENT_STAGES; ++stage) {
      init_barrier(pipeline.full + stage, 1);
      // A thread of each warp that multiplies, of both blocks.
      init_barrier(pipeline.empty + stage, CLUSTER_SIZE * 8);
    }
    fence_barrier_init();
  }
  __syncwarp();
  cluster_barrier();
  const int group = threadIdx.x / 128;
  const Moments moments{arguments, maps, pipeline, static_cast<int>(blockIdx.x) / CLUSTER_SIZE,
                        static_cast<int>(blockIdx.x) % CLUSTER_SIZE};
  if (group == 0) {
    deallocate_registers();
    if (threadIdx.x == 0) moments.fetch();
  } else {
    allocate_registers();
    moments.multiply(group - 1);
  }
  // Nobody leaves while the other block may still write into its memory.
  __syncwarp();
  cluster_barrier();
}

// Clusters of CLUSTER_SIZE blocks.
__global__ void __launch_bounds__(MOMENT_THREADS, 1)
    moments_sm90_kernel(const __grid_constant__ MomentsArguments arguments,
                        const __grid_constant__ MomentMaps maps) {
#if defined(RIFT_EMULATOR) || __CUDA_ARCH_FEAT_SM90_ALL
  run_moments(arguments, maps);
#endif
}

}  // namespace rift
