// Raw second moments of [X | Y] by mma.sync, for any GPU from sm_80 on: the same as moments_sm90.
//
// Each multiprocessor runs one block, which is a program of the schedule and computes single tiles.
// All its threads prefetch chunks of columns by cp.async into a circular buffer of stages, across
// the ends of tiles. In both operands, rows are the inner dimension; ldmatrix transposes them.
// Fragments are loaded while those of the step before are multiplied, so that a chunk needs only
// one barrier. Long sums consist of runs (runs.cuh).
//
// Memory traffic: as in moments_sm90.
#pragma once

#include "cka_large/moments_layout.h"
#include "cka_large/runs.cuh"
#include "cka_large/tiles_sm80.cuh"

namespace rift {

// 96 KiB of shared memory; sm_86 and sm_89 have 99.
constexpr int MOMENT_RING_STAGES = 3;
constexpr int MOMENT_RING_OPERAND = MOMENT_CHUNK * TILE * 2;
constexpr int MOMENT_RING_SHARED = MOMENT_RING_STAGES * 2 * MOMENT_RING_OPERAND;
static_assert(TILE == MOMENT_BLOCK);

struct MomentMatrices {
  Matrix x, y, patch_x, patch_y;
};

// The circular buffer, and the next chunk that the program fetches into it.
struct MomentRing {
  const MomentsArguments& arguments;
  const MomentMatrices& matrices;
  unsigned char* memory;
  int program, index;
  Piece piece;
  int chunk;
  // A bit for each stage, set if its tile is on the diagonal: then both operands are the same.
  unsigned diagonal_stages;

  __device__ unsigned char* left_operand(int stage) const {
    return memory + stage * 2 * MOMENT_RING_OPERAND;
  }

  __device__ unsigned char* right_operand(int stage) const {
    return left_operand(stage) + (diagonal_stages >> stage & 1 ? 0 : MOMENT_RING_OPERAND);
  }

  __device__ void fetch_block(unsigned char* tile, int block, int patch) const {
    const int blocks_x = arguments.schedule.blocks_x;
    const bool is_y = block >= blocks_x;
    const Matrix& features = is_y ? matrices.y : matrices.x;
    const Matrix& patches = is_y ? matrices.patch_y : matrices.patch_x;
    fetch_tile<MOMENT_CHUNK, TILE>(tile, patch < 0 ? features : patches,
                                   (patch < 0 ? chunk : patch) * MOMENT_CHUNK,
                                   (is_y ? block - blocks_x : block) * TILE);
  }

  // Starts to fetch the next chunk into this stage. If there is none, it commits an empty group, so
  // that groups can still be counted.
  __device__ void fetch(int stage) {
    if (chunk < piece.end) {
      const TileCoord tile = tile_coord(piece.square);
      const bool diagonal = tile.i == tile.j;
      diagonal_stages = (diagonal_stages & ~(1u << stage)) | static_cast<unsigned>(diagonal)
                                                                 << stage;
      const int patch = arguments.patch_index(chunk);
      fetch_block(left_operand(stage), tile.i, patch);
      if (!diagonal) fetch_block(right_operand(stage), tile.j, patch);
      if (++chunk == piece.end) {
        piece = arguments.schedule.piece(program, ++index);
        chunk = piece.begin;
      }
    }
    commit_copies();
  }

  __device__ void load(Fragments& fragments, int stage, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_inner_rows(fragments.a[i], left_operand(stage), 16 * step, warp_row() + 16 * i);
    }
    load_right(fragments, right_operand(stage), 16 * step);
  }
};

__device__ inline void end_run(float (&c)[4][4][4], Totals<4> (&totals)[4][4], int done, int next) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) totals[i][j].end_run(c[i][j], done, next);
  }
}

__device__ inline void store_tile(float* tile, const float (&c)[4][4][4],
                                  const Totals<4> (&totals)[4][4]) {
  const int lane = threadIdx.x % 32;
  float* out = tile + (warp_row() + lane / 4) * TILE + warp_column() + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* upper = out + 16 * i * TILE + 8 * j;
      float* lower = upper + 8 * TILE;
      const Totals<4>& total = totals[i][j];
      *reinterpret_cast<Vector<float, 2>*>(upper) = {total.sum(c[i][j], 0), total.sum(c[i][j], 1)};
      *reinterpret_cast<Vector<float, 2>*>(lower) = {total.sum(c[i][j], 2), total.sum(c[i][j], 3)};
    }
  }
}

__global__ void __launch_bounds__(TILE_THREADS, 1)
    moments_sm80_kernel(const __grid_constant__ MomentsArguments arguments,
                        const __grid_constant__ MomentMatrices matrices) {
  constexpr int STEPS = MOMENT_CHUNK / 16, STAGES = MOMENT_RING_STAGES;
  const Schedule& schedule = arguments.schedule;
  const int program = blockIdx.x;
  Piece piece = schedule.piece(program, 0);
  MomentRing ring{arguments, matrices, shared_memory(), program, 0, piece, piece.begin, 0};
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) ring.fetch(stage);
  wait_copies<STAGES - 1>();
  __syncthreads();
  Fragments fragments[2];
  ring.load(fragments[0], 0, 0);
  int stage = 0;
  for (int index = 0; piece.begin < piece.end; piece = schedule.piece(program, ++index)) {
    float c[4][4][4] = {};
    Totals<4> totals[4][4];
    const int count = piece.end - piece.begin;
    for (int done = 0, run_end = 0; done < count;) {
      if (done == run_end) run_end += next_run(done, count - done);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        if (step < STEPS - 1) {
          ring.load(fragments[(step + 1) % 2], stage, step + 1);
        } else {
          const int next = stage + 1 == STAGES ? 0 : stage + 1;
          // After this, the next chunk is in shared memory, and every thread has the present one in
          // registers, so that its stage is free.
          wait_copies<STAGES - 2>();
          __syncthreads();
          ring.fetch(stage);
          // After the last chunk, these fragments are not used.
          ring.load(fragments[0], next, 0);
          stage = next;
        }
        multiply_add(c, fragments[step % 2]);
      }
      if (++done == run_end) end_run(c, totals, done, next_run(done, count - done));
    }
    store_tile(arguments.part_address(tile_coord(piece.square), piece.square, piece.part), c,
               totals);
  }
  wait_copies<0>();
}

}  // namespace rift
