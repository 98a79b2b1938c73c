// Raw second moments of [X | Y] on Hopper: the tiles of [X Y]^T [X Y] on and above the diagonal,
// with bfloat16 products summed in float32.
//
// A cluster of two blocks is a program of the schedule and computes squares of 256 x 256, of which
// each block has 128 rows. Each multiprocessor runs one block. The producer thread of a block
// copies chunks of columns: the left operand of this block, and half of the right operand, for both
// blocks (multicast). Two consumer warpgroups compute 64 x 256 each. In both operands, rows are the
// inner dimension, which WGMMA accepts. The next launch subtracts the means. That is accurate,
// because products of bfloat16 are exact in float32 and sums of runs nearly so (runs.cuh).
//
// A square on the diagonal is symmetric, and what its lower tile would need is not multiplied. Each
// block then has one strip of 64 rows in the upper tiles and one in the lower.
//
// Memory traffic: for 128 x 256 sums of 64 products, 32 KiB from the L2 cache, or half of it on the
// diagonal; 64 KiB for each part of a tile.
#pragma once

#include "cka_large/moments_layout.h"
#include "cka_large/runs.cuh"
#include "common/elements.cuh"
#include "common/pipeline_state.h"
#include "common/sm90.cuh"

namespace rift {

// The stages of the circular buffer, each with a barrier that tells that it is full or empty.
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
  const TileCoord coord = tile_coord(square);
  return {coord.i * CLUSTER_SIZE, coord.j * CLUSTER_SIZE};
}

struct MomentMaps {
  TensorMap x, y, patch_x, patch_y;
};

struct Moments {
  const MomentsArguments& arguments;
  const MomentMaps& maps;
  Pipeline pipeline;
  int program, rank;

  // Starts to fetch 128 columns of a chunk or patch.
  __device__ void fetch_block(unsigned char* operand, int block, int chunk, int patch,
                              bool multicast, Mbarrier* full) const {
    const bool is_y = block >= arguments.schedule.blocks_x;
    const TensorMap* map = is_y ? &maps.y : &maps.x;
    if (patch >= 0) map = is_y ? &maps.patch_y : &maps.patch_x;
    const int row = (patch < 0 ? chunk : patch) * MOMENT_CHUNK;
    const int column = (is_y ? block - arguments.schedule.blocks_x : block) * MOMENT_BLOCK;
#pragma unroll
    for (int box = 0; box < MOMENT_BLOCK / BOX_COLUMNS; ++box) {
      unsigned char* target = operand + box * BOX_BYTES;
      if (multicast) {
        copy_box_multicast(target, map, column + box * BOX_COLUMNS, row, full);
      } else {
        copy_box(target, map, column + box * BOX_COLUMNS, row, full);
      }
    }
  }

  // The producer thread.
  __device__ void fetch() const {
    PipelineState<MOMENT_STAGES> state;
    for (int index = 0;; ++index) {
      const Piece piece = arguments.schedule.piece(program, index);
      if (piece.begin == piece.end) return;
      const TileCoord tile = first_tile(piece.square);
      const bool diagonal = tile.i == tile.j;
      for (int chunk = piece.begin; chunk < piece.end; ++chunk, state.advance()) {
        // Waits until both blocks have released the stage; the first round does not wait.
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

  // 64 rows of a square.
  struct Strip {
    TileCoord first;  // tile of the square
    int index;
    bool is_diagonal;
  };

  // A consumer warpgroup, the first or second of its block.
  __device__ void multiply(int warpgroup) const {
    PipelineState<MOMENT_STAGES> state;
    for (int index = 0;; ++index) {
      const Piece piece = arguments.schedule.piece(program, index);
      if (piece.begin == piece.end) return;
      const TileCoord tile = first_tile(piece.square);
      const bool is_diagonal = uniform(tile.i == tile.j);
      if (is_diagonal && warpgroup == 1) {
        multiply_strip<1>({tile, 3 - rank, true}, piece, state);
      } else {
        const int strip = is_diagonal ? rank : 2 * rank + warpgroup;
        multiply_strip<0>({tile, strip, is_diagonal}, piece, state);
      }
    }
  }

  // Computes a strip from this column of tiles on.
  template <int ACROSS>
  __device__ void multiply_strip(Strip strip, const Piece& piece,
                                 PipelineState<MOMENT_STAGES>& state) const {
    constexpr int SIZE = (CLUSTER_SIZE - ACROSS) * MOMENT_BLOCK / 2;
    float c[SIZE] = {};
    Totals<SIZE> totals;
    const int count = piece.end - piece.begin;
    for (int done = 0; done < count;) {
      const int run = next_run(done, count - done);
      multiply_run<ACROSS>(c, run, strip, state);
      done += run;
      totals.end_run(c, done, next_run(done, count - done));
    }
    store<ACROSS>(c, totals, strip, piece);
  }

  // Multiplies the chunks of a run. No products are pending before and after it.
  template <int ACROSS, int SIZE>
  __device__ void multiply_run(float (&c)[SIZE], int chunks, Strip strip,
                               PipelineState<MOMENT_STAGES>& state) const {
    const int lane = threadIdx.x % 32;
    int previous = -1;
    for (int chunk = 0; chunk < chunks; ++chunk, state.advance()) {
      wait_barrier(pipeline.full + state.stage, state.parity);
      const unsigned char* right = pipeline.right(state.stage);
      const unsigned char* left = strip.is_diagonal
                                      ? right + strip.index * BOX_BYTES
                                      : pipeline.left(state.stage) + strip.index % 2 * BOX_BYTES;
      const uint64_t a = matrix_descriptor(left, BOX_BYTES);
      const uint64_t b = matrix_descriptor(right + ACROSS * OPERAND_BYTES, BOX_BYTES);
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < MOMENT_CHUNK / 16; ++step) {
        // Advances by 16 rows of 128 bytes, in the descriptor's units of 16 bytes.
        multiply_add(c, a + step * (16 * 128 / 16), b + step * (16 * 128 / 16));
      }
      warpgroup_commit();
      // The previous chunk's products are complete; this chunk's run while the next one is fetched.
      warpgroup_wait<1>();
      if (previous >= 0 && lane < CLUSTER_SIZE) arrive_remote(pipeline.empty + previous, lane);
      previous = state.stage;
    }
    warpgroup_wait<0>();
    if (lane < CLUSTER_SIZE) arrive_remote(pipeline.empty + previous, lane);
  }

  template <int ACROSS, int SIZE>
  __device__ void store(const float (&c)[SIZE], const Totals<SIZE>& totals, Strip strip,
                        const Piece& piece) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int across = ACROSS; across < CLUSTER_SIZE; ++across) {
      const TileCoord tile{strip.first.i + strip.index / 2, strip.first.j + across};
      // Skips tiles beyond the last column.
      if (tile.i >= arguments.schedule.blocks() || tile.j >= arguments.schedule.blocks()) continue;
      float* out = arguments.part_address(tile, piece.square, piece.part);
      out += (strip.index % 2 * 64 + warp * 16 + lane / 4) * MOMENT_BLOCK + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int k = 4 * (16 * (across - ACROSS) + n);
        *reinterpret_cast<Vector<float, 2>*>(out + 8 * n) = {totals.sum(c, k),
                                                             totals.sum(c, k + 1)};
        *reinterpret_cast<Vector<float, 2>*>(out + 8 * MOMENT_BLOCK + 8 * n) = {
            totals.sum(c, k + 2), totals.sum(c, k + 3)};
      }
    }
  }
};

__device__ inline void run_moments(const MomentsArguments& arguments, const MomentMaps& maps) {
  // Swizzled boxes begin at multiples of 1024 bytes, and at the same addresses in both blocks.
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  auto* barriers = reinterpret_cast<Mbarrier*>(memory + MOMENT_STAGES * STAGE_BYTES);
  const Pipeline pipeline{memory, barriers, barriers + MOMENT_STAGES};
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.x);
    prefetch_tensor_map(&maps.y);
    for (int stage = 0; stage < MOMENT_STAGES; ++stage) {
      init_barrier(pipeline.full + stage, 1);
      // One thread of each consumer warp arrives, in both blocks.
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
    moments.multiply(uniform(group - 1));
  }
  // A block must not exit while the other may still access its shared memory.
  __syncwarp();
  cluster_barrier();
}

// Launched as clusters of CLUSTER_SIZE blocks. Empty unless compiled for sm_90a.
__global__ void __launch_bounds__(MOMENT_THREADS, 1)
    moments_sm90_kernel(const __grid_constant__ MomentsArguments arguments,
                        const __grid_constant__ MomentMaps maps) {
#if defined(RIFT_EMULATOR) || __CUDA_ARCH_FEAT_SM90_ALL
  run_moments(arguments, maps);
#endif
}

}  // namespace rift
