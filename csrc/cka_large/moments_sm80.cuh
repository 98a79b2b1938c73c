// Raw second moments of [X | Y] by mma.sync: what moments_sm90 computes, on any GPU from sm_80 on.
//
// One block a processor owns a run of the schedule, of single tiles. All its threads fetch chunks of columns ahead, by
// cp.async into a ring of stages, across the ends of tiles; both operands have their inner dimension
// as rows, which ldmatrix turns over. A step's fragments are loaded while the step before multiplies,
// so that one barrier a chunk is all that anybody waits for. Long sums are made of runs (runs.cuh).
//
// Bytes: as moments_sm90.
#pragma once

#include "cka_large/moments_layout.h"
#include "cka_large/runs.cuh"
#include "cka_large/tiles_sm80.cuh"

namespace rift {

// 96 KiB: sm_86 and sm_89 have no more than 99.
constexpr int MOMENT_RING_STAGES = 3;
constexpr int MOMENT_RING_OPERAND = MOMENT_CHUNK * TILE * 2;
constexpr int MOMENT_RING_SHARED = MOMENT_RING_STAGES * 2 * MOMENT_RING_OPERAND;
static_assert(TILE == MOMENT_BLOCK);

struct MomentMatrices {
  Matrix x, y, patch_x, patch_y;
};

// The chunks that a program fetches, one after another.
struct MomentRing {
  const MomentsArguments& arguments;
  const MomentMatrices& matrices;
  unsigned char* memory;
  int program, index;
  Piece piece;
  int chunk;
  // A bit for each stage: its tile is on the diagonal, where both operands are one.
  unsigned once;

  __device__ unsigned char* left_operand(int stage) const {
    return memory + stage * 2 * MOMENT_RING_OPERAND;
  }

  __device__ unsigned char* right_operand(int stage) const {
    return left_operand(stage) + (once >> stage & 1 ? 0 : MOMENT_RING_OPERAND);
  }

  __device__ void fetch_block(unsigned char* to, int block, int patch) const {
    const int blocks_x = arguments.schedule.blocks_x;
    const bool is_y = block >= blocks_x;
    const Matrix& all = is_y ? matrices.y : matrices.x;
    const Matrix& patches = is_y ? matrices.patch_y : matrices.patch_x;
    fetch_tile<MOMENT_CHUNK, TILE>(to, patch < 0 ? all : patches,
                                   (patch < 0 ? chunk : patch) * MOMENT_CHUNK,
                                   (is_y ? block - blocks_x : block) * TILE);
  }

  // The next one into this stage; also where there is none, it is a group of its own.
  __device__ void fetch(int stage) {
    if (chunk < piece.last) {
      const TileCoord tile = tile_coord(piece.square);
      const bool diagonal = tile.i == tile.j;
      once = (once & ~(1u << stage)) | static_cast<unsigned>(diagonal) << stage;
      const int patch = arguments.patch_index(chunk);
      fetch_block(left_operand(stage), tile.i, patch);
      if (!diagonal) fetch_block(right_operand(stage), tile.j, patch);
      if (++chunk == piece.last) {
        piece = arguments.schedule.piece(program, ++index);
        chunk = piece.first;
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
      float* at = out + 16 * i * TILE + 8 * j;
      const Totals<4>& own = totals[i][j];
      *reinterpret_cast<Vector<float, 2>*>(at) = {own.sum(c[i][j], 0), own.sum(c[i][j], 1)};
      *reinterpret_cast<Vector<float, 2>*>(at + 8 * TILE) = {own.sum(c[i][j], 2),
                                                             own.sum(c[i][j], 3)};
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
  MomentRing ring{arguments, matrices, shared_memory(), program, 0, piece, piece.first, 0};
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) ring.fetch(stage);
  wait_copies<STAGES - 1>();
  __syncthreads();
  Fragments fragments[2];
  ring.load(fragments[0], 0, 0);
  int stage = 0;
  for (int index = 0; piece.first < piece.last; piece = schedule.piece(program, ++index)) {
    float c[4][4][4] = {};
    Totals<4> totals[4][4];
    const int count = piece.last - piece.first;
    for (int done = 0, end = 0; done < count;) {
      if (done == end) end += next_run(done, count - done);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        if (step < STEPS - 1) {
          ring.load(fragments[(step + 1) % 2], stage, step + 1);
        } else {
          const int next = stage + 1 == STAGES ? 0 : stage + 1;
          // The next chunk is there; and all have this one in registers, so that its stage is free.
          wait_copies<STAGES - 2>();
          __syncthreads();
          ring.fetch(stage);
          // Behind the last chunk nobody multiplies what this loads.
          ring.load(fragments[0], next, 0);
          stage = next;
        }
        multiply_add(c, fragments[step % 2]);
      }
      if (++done == end) end_run(c, totals, done, next_run(done, count - done));
    }
    store_tile(arguments.part_address(tile_coord(piece.square), piece.square, piece.part), c,
               totals);
  }
  wait_copies<0>();
}

}  // namespace rift
