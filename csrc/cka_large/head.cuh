// The kernel cka_large_head, Triton's covariance_cka: from partial second moments to the operands
// of the gradient, and by head.h to linear CKA.
//
// A block owns a strip of 32 rows of a tile of A, B or C. It sums the parts of the tile in order,
// centers them and scales them to features of unit norm. It stores sums of squares and the
// operands of the backward pass, as two bfloat16 each: A above F = C^T - t A, and B above
// F = C - t B. The last blocks of the grid sum the weighted columns of `row_terms`. The last block
// to finish computes the value.
//
// Memory traffic: the tiles once, those of A and B twice because of F; 4 bytes for each element of
// A and F.
#pragma once

#include "cka_large/head.h"
#include "cka_large/long_rows.cuh"
#include "cka_large/strip.cuh"

namespace rift {

// Centers and scales a strip of a tile.
__device__ inline void center(StripElements& x, float n, const float (&mean_i)[HEAD_ROWS],
                              const float (&mean_j)[HEAD_VECTOR], float scale_i, float scale_j) {
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    const float outer = n * mean_i[k];
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) {
      x[k][e] = (x[k][e] - outer * mean_j[e]) * scale_i * scale_j;
    }
  }
}

// A strip of C minus t times the same strip of A or B.
__device__ inline void subtract_own(const CkaLargeArguments& arguments, float n,
                                    const UnitScales& scales, const MomentTile& tile, int strip,
                                    bool is_y, const StripElements& cross,
                                    StripElements& difference, HeadScratch& scratch) {
  const int offset = is_y ? arguments.schedule.blocks_x : 0;
  const TileCoord own_tile{offset + min(tile.i, tile.j), offset + max(tile.i, tile.j)};
  float mean_i[HEAD_ROWS], mean_j[HEAD_VECTOR];
  read_means(arguments, is_y, tile.i * MOMENT_BLOCK + strip * STRIP + head_row(), mean_i);
  read_means(arguments, is_y, tile.j * MOMENT_BLOCK + head_column(), mean_j);
  read_strip(arguments, own_tile, strip, tile.i > tile.j, difference, scratch);
  const float scale = is_y ? scales.y : scales.x;
  center(difference, n, mean_i, mean_j, scale, scale);
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
#pragma unroll
    for (int e = 0; e < HEAD_VECTOR; ++e) {
      difference[k][e] = cross[k][e] - scales.t * difference[k][e];
    }
  }
}

__device__ inline void process_strip(const CkaLargeArguments& arguments, const UnitScales& scales,
                                     HeadScratch& scratch) {
  const int slot = blockIdx.x / STRIPS, strip = blockIdx.x % STRIPS;
  const MomentTile tile = arguments.schedule.tile(slot);
  const int i = tile.i * MOMENT_BLOCK + strip * STRIP, j = tile.j * MOMENT_BLOCK;
  const auto n = static_cast<float>(arguments.rows - read_long_rows(arguments).count);
  float mean_i[HEAD_ROWS], mean_j[HEAD_VECTOR];
  read_means(arguments, tile.left_is_y, i + head_row(), mean_i);
  read_means(arguments, tile.right_is_y, j + head_column(), mean_j);
  StripElements x;
  read_strip(arguments, tile_coord(slot), strip, false, x, scratch);
  center(x, n, mean_i, mean_j, tile.left_is_y ? scales.y : scales.x,
         tile.right_is_y ? scales.y : scales.x);
  if (tile.left_is_y == tile.right_is_y) {
    set_square(tile.left_is_y ? SQUARE_B : SQUARE_A, x, tile.i == tile.j ? 1 : 2, scratch);
    unsigned short* plane = tile.left_is_y ? arguments.planes_y : arguments.planes_x;
    if (plane) {
      store_direct(arguments, plane, i, j, x);
      // The mirror image of the tile; a tile on the diagonal contains its own.
      if (tile.i != tile.j) store_transposed(arguments, plane, i, j, x, scratch);
    }
    return;
  }
  set_square(SQUARE_C, x, 1, scratch);
  const bool equal_widths = arguments.x.width == arguments.y.width;
  const long long below = static_cast<long long>(arguments.width) * arguments.width;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    unsigned short* plane = side ? arguments.planes_y : arguments.planes_x;
    if (!plane) continue;
    StripElements f;
    if (equal_widths) {
      subtract_own(arguments, n, scales, tile, strip, side, x, f, scratch);
    } else {
#pragma unroll
      for (int k = 0; k < HEAD_ROWS; ++k) {
#pragma unroll
        for (int e = 0; e < HEAD_VECTOR; ++e) f[k][e] = x[k][e];
      }
    }
    set_square(side ? SQUARE_FY : SQUARE_FX, f, 1, scratch);
    if (side == 0) {
      store_transposed(arguments, plane + below, i, j, f, scratch);
      store_shift_x(arguments, tile.j, i, f);
    } else {
      store_direct(arguments, plane + below, i, j, f);
      store_shift_y(arguments, tile.i * STRIPS + strip, j, f, scratch);
    }
  }
}

// Computes the value and the scalars of the gradient, with the last block.
__device__ inline void write_value(const CkaLargeArguments& arguments, const UnitScales& scales,
                                   HeadScratch& scratch) {
  CkaLargeSums& sums = scratch.totals;
  const double of_elements =
      sum_of_blocks<HEAD_SUMS>(arguments.head_sums, arguments.strip_blocks(), scratch.sums);
  if (threadIdx.x < HEAD_SUMS) sums.elements[threadIdx.x] = of_elements;
  if (arguments.debiased) {
    const double of_rows =
        sum_of_blocks<ROW_SUMS>(arguments.row_sums, arguments.row_blocks, scratch.sums);
    if (threadIdx.x < ROW_SUMS) sums.rows[threadIdx.x] = of_rows;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  sums.long_x = sums.long_y = 0;
  if (arguments.debiased) {
    const LongRows long_rows = read_long_rows(arguments);
#pragma unroll
    for (int s = 0; s < MAX_LONG_ROWS; ++s) {
      if (s >= long_rows.count) continue;
      const RowTerms terms = arguments.row_terms[long_rows.rows[s]];
      sums.long_x += terms.energies[0];
      sums.long_y += terms.energies[1];
    }
  }
  sums.pivot_energy_x = arguments.pivot_energies[0];
  sums.pivot_energy_y = arguments.pivot_energies[1];
  *arguments.value =
      cka_large_head(sums, arguments.rows, scales.x, scales.y, scales.t, arguments.debiased,
                     arguments.distance, arguments.may_use_low_halves, arguments.scalars);
}

__global__ void __launch_bounds__(HEAD_THREADS, 3)
    cka_large_head_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  auto& scratch = *reinterpret_cast<HeadScratch*>(shared_memory());
  const UnitScales scales = *arguments.scales;
  if (static_cast<int>(blockIdx.x) < arguments.strip_blocks()) {
    clear_squares(scratch);
    process_strip(arguments, scales, scratch);
    __syncthreads();
    if (threadIdx.x < HEAD_SUMS) {
      double total = 0;
#pragma unroll
      for (int warp = 0; warp < HEAD_WARPS; ++warp) {
        total += scratch.sums[warp * HEAD_SUMS + threadIdx.x];
      }
      arguments.head_sums[threadIdx.x * arguments.strip_blocks() + blockIdx.x] = total;
    }
  } else {
    const int index = (blockIdx.x - arguments.strip_blocks()) * HEAD_THREADS + threadIdx.x;
    float total = 0;
#pragma unroll 16
    for (int block = 0; block < arguments.row_blocks; ++block) {
      total +=
          arguments.weighted_parts[static_cast<long long>(block) * 4 * arguments.width + index];
    }
    arguments.weighted_sums[index] = total;
  }
  // The last block to arrive must see the writes of all blocks. The fence of thread 0 covers writes
  // by the other threads of its block only after a barrier.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    scratch.last = atomicAdd(arguments.counters, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!scratch.last) return;
  write_value(arguments, scales, scratch);
}

}  // namespace rift
