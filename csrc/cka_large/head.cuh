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
#include "cka_large/longest.cuh"
#include "cka_large/strip.cuh"

namespace rift {

// Scales of X and Y to unit norm, and the regression coefficient of the scaled sides.
struct UnitScales {
  float x, y, t;
};

// Subtracts from a strip of C t times the same strip of A or B.
__device__ inline void subtract_own(const CkaLargeArguments& arguments, const LongRows& long_rows,
                                    const UnitScales& scales, const MomentTile& tile, int strip,
                                    bool is_y, const float (&cross)[HEAD_ROWS],
                                    float (&difference)[HEAD_ROWS], HeadScratch& scratch) {
  const int offset = is_y ? arguments.schedule.blocks_x : 0;
  const TileCoord own_tile{offset + min(tile.i, tile.j), offset + max(tile.i, tile.j)};
  const int i = tile.i * MOMENT_BLOCK + strip * STRIP, j = tile.j * MOMENT_BLOCK;
  read_strip(arguments, own_tile, strip, tile.i > tile.j, difference, scratch);
  const int row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS, column = threadIdx.x % MOMENT_BLOCK;
  const float scale = is_y ? scales.y : scales.x;
  const auto n = static_cast<float>(remaining_rows(arguments, long_rows));
  const float mean_j = column_mean(arguments, long_rows, is_y, j + column);
  __syncthreads();
  if (threadIdx.x < STRIP) {
    scratch.own_mean_i[threadIdx.x] = column_mean(arguments, long_rows, is_y, i + threadIdx.x);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    const float mean_i = scratch.own_mean_i[row + k];
    difference[k] = cross[k] - scales.t * ((difference[k] - n * mean_i * mean_j) * scale * scale);
  }
}

__device__ inline void process_strip(const CkaLargeArguments& arguments, const UnitScales& scales,
                                     double (&sums)[HEAD_SUMS], HeadScratch& scratch) {
  const int slot = blockIdx.x / STRIPS, strip = blockIdx.x % STRIPS;
  const MomentTile tile = arguments.schedule.tile(slot);
  const int i = tile.i * MOMENT_BLOCK + strip * STRIP, j = tile.j * MOMENT_BLOCK;
  const int row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS, column = threadIdx.x % MOMENT_BLOCK;
  const LongRows long_rows = read_long_rows(arguments);
  if (threadIdx.x < STRIP) {
    scratch.mean_i[threadIdx.x] =
        column_mean(arguments, long_rows, tile.left_is_y, i + threadIdx.x);
  }
  if (threadIdx.x < MOMENT_BLOCK) {
    scratch.mean_j[threadIdx.x] =
        column_mean(arguments, long_rows, tile.right_is_y, j + threadIdx.x);
  }
  __syncthreads();
  float x[HEAD_ROWS];
  read_strip(arguments, tile_coord(slot), strip, false, x, scratch);
  const float scale_i = tile.left_is_y ? scales.y : scales.x;
  const float scale_j = tile.right_is_y ? scales.y : scales.x;
  const auto n = static_cast<float>(remaining_rows(arguments, long_rows));
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    const float outer = n * scratch.mean_i[row + k];
    x[k] = (x[k] - outer * scratch.mean_j[column]) * scale_i * scale_j;
  }
  double square = sum_of_squares(x);
  if (tile.left_is_y == tile.right_is_y) {
    square *= tile.i == tile.j ? 1 : 2;
    if (tile.i == tile.j && threadIdx.x < STRIP) {
      arguments.means[tile.left_is_y * arguments.width + i + threadIdx.x] =
          scratch.mean_i[threadIdx.x];
    }
    unsigned short* plane = tile.left_is_y ? arguments.planes_y : arguments.planes_x;
    sums[SQUARE_A] = tile.left_is_y ? 0 : square;
    sums[SQUARE_B] = tile.left_is_y ? square : 0;
    if (plane) {
      store_direct(arguments, plane, i, j, x);
      // The mirror image of the tile; a tile on the diagonal contains its own.
      if (tile.i != tile.j) store_transposed(arguments, plane, i, j, x, scratch);
    }
    return;
  }
  sums[SQUARE_C] = square;
  const bool equal_widths = arguments.x.width == arguments.y.width;
  const long long below = static_cast<long long>(arguments.width) * arguments.width;
  float f[HEAD_ROWS];
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) f[k] = x[k];
  if (arguments.planes_x) {
    if (equal_widths) subtract_own(arguments, long_rows, scales, tile, strip, false, x, f, scratch);
    sums[SQUARE_FX] = sum_of_squares(f);
    store_transposed(arguments, arguments.planes_x + below, i, j, f, scratch);
    store_shift_x(arguments, tile.j, i, scratch);
  }
  if (arguments.planes_y) {
    if (equal_widths) subtract_own(arguments, long_rows, scales, tile, strip, true, x, f, scratch);
    sums[SQUARE_FY] = sum_of_squares(f);
    store_direct(arguments, arguments.planes_y + below, i, j, f);
    store_shift_y(arguments, tile.i * STRIPS + strip, j, f, scratch);
  }
}

// Computes the value and the scalars of the gradient, with the last block.
__device__ inline void write_value(const CkaLargeArguments& arguments, const UnitScales& scales,
                                   const double (&statistics)[STATISTICS], HeadScratch& scratch) {
  CkaLargeSums sums{};
#pragma unroll
  for (int kind = 0; kind < HEAD_SUMS; ++kind) {
    for (int i = threadIdx.x; i < arguments.strip_blocks(); i += HEAD_THREADS) {
      sums.elements[kind] += arguments.head_sums[static_cast<long long>(i) * HEAD_SUMS + kind];
    }
  }
  block_sums(sums.elements, scratch.sums);
  if (arguments.debiased) {
#pragma unroll
    for (int kind = 0; kind < ROW_SUMS; ++kind) {
      for (int i = threadIdx.x; i < arguments.row_blocks; i += HEAD_THREADS) {
        sums.rows[kind] += arguments.row_sums[i * ROW_SUMS + kind];
      }
    }
    block_sums(sums.rows, scratch.sums);
    const LongRows long_rows = read_long_rows(arguments);
    const float* energies = arguments.row_terms + static_cast<long long>(ENERGY) * arguments.rows;
#pragma unroll
    for (int s = 0; s < MAX_LONG_ROWS; ++s) {
      if (s >= long_rows.count) continue;
      sums.long_x += energies[long_rows.rows[s]];
      sums.long_y += energies[arguments.rows + long_rows.rows[s]];
    }
  }
  sums.pivot_energy_x = statistics[PIVOT_ENERGY_X];
  sums.pivot_energy_y = statistics[PIVOT_ENERGY_Y];
  if (threadIdx.x == 0) {
    *arguments.value =
        cka_large_head(sums, arguments.rows, scales.x, scales.y, scales.t, arguments.debiased,
                       arguments.distance, arguments.may_use_low_halves, arguments.scalars);
  }
}

__global__ void __launch_bounds__(HEAD_THREADS)
    cka_large_head_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  auto& scratch = *reinterpret_cast<HeadScratch*>(shared_memory());
  double statistics[STATISTICS];
  read_statistics(arguments, statistics, scratch.sums);
  UnitScales scales{inverse_scale(statistics[ENERGY_X], statistics[PIVOT_ENERGY_X]),
                    inverse_scale(statistics[ENERGY_Y], statistics[PIVOT_ENERGY_Y]), 0};
  if (arguments.x.width == arguments.y.width) {
    // With features of unit norm, X on Y and Y on X have the same regression coefficient.
    scales.t = static_cast<float>(statistics[ENERGY_XY] * scales.x * scales.y);
  }
  if (static_cast<int>(blockIdx.x) < arguments.strip_blocks()) {
    double sums[HEAD_SUMS] = {};
    process_strip(arguments, scales, sums, scratch);
    block_sums(sums, scratch.sums);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int kind = 0; kind < HEAD_SUMS; ++kind) {
        arguments.head_sums[static_cast<long long>(blockIdx.x) * HEAD_SUMS + kind] = sums[kind];
      }
    }
  } else {
    const int index = (blockIdx.x - arguments.strip_blocks()) * HEAD_THREADS + threadIdx.x;
    float total = 0;
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
  write_value(arguments, scales, statistics, scratch);
}

}  // namespace rift
