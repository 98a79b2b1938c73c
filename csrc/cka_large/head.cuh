// From partial second moments to linear CKA and the operands of its gradient.
//
// A block owns 32 rows of a tile of A, B or C: adds up the parts of the tile in their order, takes the
// means off, scales to features of unit norm; leaves what the backward multiplies in two bfloat16
// each, A above F = C^T - t A, and B above F = C - t B, and sums of squares. Blocks behind them add up
// the rows' weighted sums; the last of all to finish has the head.
//
// Bytes: the tiles once, those of A and B once more for F; 4 for each element of A and F.
#pragma once

#include "cka_large/head.h"
#include "cka_large/longest.cuh"

namespace rift {

constexpr int HEAD_THREADS = 256;
// Rows of a strip that a thread has: all threads of a warp in one row, side by side.
constexpr int HEAD_ROWS = STRIP * MOMENT_BLOCK / HEAD_THREADS;
constexpr int STRIP_PITCH = MOMENT_BLOCK + 1;

static_assert(static_cast<int>(ROW_SUMS) >= static_cast<int>(HEAD_SUMS));

struct HeadScratch {
  float strip[STRIP * STRIP_PITCH];
  float mean_i[STRIP], mean_j[MOMENT_BLOCK];
  float own_i[STRIP];  // means of the side whose A or B is taken off
  // Of rows or of the head itself, of which there are fewer.
  double sums[ROW_SUMS * HEAD_THREADS / 32];
  int last;
};

// This thread's elements of a strip of a tile, over all parts that there are of it; `transposed`: of the
// tile's transpose.
__device__ inline void read_strip(const CkaLargeArguments& arguments, TileCoord tile, int part,
                                  bool transposed, float (&x)[HEAD_ROWS], HeadScratch& scratch) {
  const MomentsArguments moments{
      arguments.schedule, arguments.tiles, arguments.spill, nullptr, nullptr, 0};
  const int square = arguments.schedule.square_of(tile);
  const int parts = arguments.schedule.parts(square);
  const float* first = moments.part_address(tile, square, 0);
  const float* second = parts > 1 ? moments.part_address(tile, square, 1) : nullptr;
  const long long next = 1LL * arguments.schedule.side * arguments.schedule.side * MOMENT_TILE;
  const auto total = [&](int at) {
    float sum = first[at];
    for (int other = 1; other < parts; ++other) sum += second[(other - 1) * next + at];
    return sum;
  };
  const int column = threadIdx.x % MOMENT_BLOCK, row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS;
  if (!transposed) {
#pragma unroll
    for (int i = 0; i < HEAD_ROWS; ++i) {
      x[i] = total((part * STRIP + row + i) * MOMENT_BLOCK + column);
    }
    return;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < STRIP * MOMENT_BLOCK; at += HEAD_THREADS) {
    scratch.strip[at % STRIP * STRIP_PITCH + at / STRIP] =
        total(at / STRIP * MOMENT_BLOCK + part * STRIP + at % STRIP);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < HEAD_ROWS; ++i) x[i] = scratch.strip[(row + i) * STRIP_PITCH + column];
}

// A strip into both halves of a plane whose rows are the strip's rows.
__device__ inline void store_direct(const CkaLargeArguments& arguments, unsigned short* plane,
                                    int i, int j, const float (&x)[HEAD_ROWS]) {
  const long long half = 2LL * arguments.width * arguments.width;
  const int column = threadIdx.x % MOMENT_BLOCK, row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    unsigned short* at = plane + static_cast<long long>(i + row + k) * arguments.width + j + column;
    at[0] = round_to_bf16(x[k]);
    at[half] = round_to_bf16(x[k] - bf16_to_float(at[0]));
  }
}

// The same with the strip's columns as rows, through scratch.strip, which holds it afterwards.
__device__ inline void store_transposed(const CkaLargeArguments& arguments, unsigned short* plane,
                                        int i, int j, const float (&x)[HEAD_ROWS],
                                        HeadScratch& scratch) {
  const long long half = 2LL * arguments.width * arguments.width;
  const int column = threadIdx.x % MOMENT_BLOCK, row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) scratch.strip[(row + k) * STRIP_PITCH + column] = x[k];
  __syncthreads();
  for (int at = threadIdx.x; at < STRIP * MOMENT_BLOCK; at += HEAD_THREADS) {
    const float value = scratch.strip[at % STRIP * STRIP_PITCH + at / STRIP];
    unsigned short* to =
        plane + static_cast<long long>(j + at / STRIP) * arguments.width + i + at % STRIP;
    to[0] = round_to_bf16(value);
    to[half] = round_to_bf16(value - bf16_to_float(to[0]));
  }
}

__device__ inline float high_half(float x) { return bf16_to_float(round_to_bf16(x)); }
__device__ inline float low_half(float x) { return bf16_to_float(round_to_bf16(x - high_half(x))); }

// What the means of the left operand's columns add to every row of the gradient, for both halves:
// of the strip in scratch.strip, along its rows or down its columns.
__device__ inline void store_shift_along(const CkaLargeArguments& arguments, int block_j, int i,
                                         HeadScratch& scratch) {
  constexpr int THREADS_A_ROW = HEAD_THREADS / STRIP;
  const long long half = static_cast<long long>(arguments.width / STRIP) * arguments.width;
  const int row = threadIdx.x / THREADS_A_ROW;
  float high = 0, low = 0;
  for (int j = threadIdx.x % THREADS_A_ROW; j < MOMENT_BLOCK; j += THREADS_A_ROW) {
    const float x = scratch.strip[row * STRIP_PITCH + j];
    high += scratch.mean_j[j] * high_half(x);
    low += scratch.mean_j[j] * low_half(x);
  }
  high = warp_sum(high, THREADS_A_ROW);
  low = warp_sum(low, THREADS_A_ROW);
  if (threadIdx.x % THREADS_A_ROW == 0) {
    float* out = arguments.shift_x + block_j * arguments.width + i + row;
    out[0] = high;
    out[half] = low;
  }
}

__device__ inline void store_shift_down(const CkaLargeArguments& arguments, int strip, int j,
                                        const float (&x)[HEAD_ROWS], HeadScratch& scratch) {
  const long long half = static_cast<long long>(arguments.width / STRIP) * arguments.width;
  const int column = threadIdx.x % MOMENT_BLOCK, part = threadIdx.x / MOMENT_BLOCK;
  float high = 0, low = 0;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    high += scratch.mean_i[part * HEAD_ROWS + k] * high_half(x[k]);
    low += scratch.mean_i[part * HEAD_ROWS + k] * low_half(x[k]);
  }
  __syncthreads();
  scratch.strip[part * 2 * STRIP_PITCH + column] = high;
  scratch.strip[(part * 2 + 1) * STRIP_PITCH + column] = low;
  __syncthreads();
  if (part == 0) {
    float* out = arguments.shift_y + strip * arguments.width + j + column;
    out[0] = scratch.strip[column] + scratch.strip[2 * STRIP_PITCH + column];
    out[half] = scratch.strip[STRIP_PITCH + column] + scratch.strip[3 * STRIP_PITCH + column];
  }
}

struct UnitScales {
  float x, y, t;
};

__device__ inline double squares(const float (&x)[HEAD_ROWS]) {
  double sum = 0;
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(x[k]);
  return sum;
}

// A strip of C less t times the same of A or B, of unit norm.
__device__ inline void subtract_own(const CkaLargeArguments& arguments, const LongRows& long_rows,
                                    const UnitScales& scales, const MomentTile& tile, int part,
                                    bool is_y, const float (&cross)[HEAD_ROWS],
                                    float (&rest)[HEAD_ROWS], HeadScratch& scratch) {
  const int before = is_y ? arguments.schedule.blocks_x : 0;
  const TileCoord own{before + min(tile.i, tile.j), before + max(tile.i, tile.j)};
  const int i = tile.i * MOMENT_BLOCK + part * STRIP, j = tile.j * MOMENT_BLOCK;
  read_strip(arguments, own, part, tile.i > tile.j, rest, scratch);
  const int row = threadIdx.x / MOMENT_BLOCK * HEAD_ROWS, column = threadIdx.x % MOMENT_BLOCK;
  const float scale = is_y ? scales.y : scales.x;
  const auto n = static_cast<float>(remaining_rows(arguments, long_rows));
  const float mean_j = column_mean(arguments, long_rows, is_y, j + column);
  __syncthreads();
  if (threadIdx.x < STRIP) {
    scratch.own_i[threadIdx.x] = column_mean(arguments, long_rows, is_y, i + threadIdx.x);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    const float mean_i = scratch.own_i[row + k];
    rest[k] = cross[k] - scales.t * ((rest[k] - n * mean_i * mean_j) * scale * scale);
  }
}

__device__ inline void process_strip(const CkaLargeArguments& arguments, const UnitScales& scales,
                                     double (&sums)[HEAD_SUMS], HeadScratch& scratch) {
  const int slot = blockIdx.x / STRIPS, part = blockIdx.x % STRIPS;
  const MomentTile tile = arguments.schedule.tile(slot);
  const int i = tile.i * MOMENT_BLOCK + part * STRIP, j = tile.j * MOMENT_BLOCK;
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
  read_strip(arguments, tile_coord(slot), part, false, x, scratch);
  const float scale_i = tile.left_is_y ? scales.y : scales.x;
  const float scale_j = tile.right_is_y ? scales.y : scales.x;
  const auto n = static_cast<float>(remaining_rows(arguments, long_rows));
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) {
    const float outer = n * scratch.mean_i[row + k];
    x[k] = (x[k] - outer * scratch.mean_j[column]) * scale_i * scale_j;
  }
  double square = squares(x);
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
      // The tile's mirror image; on the diagonal the tile holds it itself.
      if (tile.i != tile.j) store_transposed(arguments, plane, i, j, x, scratch);
    }
    return;
  }
  sums[SQUARE_C] = square;
  const bool near = arguments.x.width == arguments.y.width;
  const long long below = static_cast<long long>(arguments.width) * arguments.width;
  float rest[HEAD_ROWS];
#pragma unroll
  for (int k = 0; k < HEAD_ROWS; ++k) rest[k] = x[k];
  if (arguments.planes_x) {
    if (near) subtract_own(arguments, long_rows, scales, tile, part, false, x, rest, scratch);
    sums[SQUARE_FX] = squares(rest);
    store_transposed(arguments, arguments.planes_x + below, i, j, rest, scratch);
    store_shift_along(arguments, tile.j, i, scratch);
  }
  if (arguments.planes_y) {
    if (near) subtract_own(arguments, long_rows, scales, tile, part, true, x, rest, scratch);
    sums[SQUARE_FY] = squares(rest);
    store_direct(arguments, arguments.planes_y + below, i, j, rest);
    store_shift_down(arguments, tile.i * STRIPS + part, j, rest, scratch);
  }
}

__device__ inline void finish(const CkaLargeArguments& arguments, const UnitScales& scales,
                              const double (&statistics)[STATISTICS], HeadScratch& scratch) {
  CkaLargeSums sums{};
#pragma unroll
  for (int kind = 0; kind < HEAD_SUMS; ++kind) {
    for (int i = threadIdx.x; i < arguments.strip_programs(); i += HEAD_THREADS) {
      sums.blocks[kind] += arguments.head_sums[static_cast<long long>(i) * HEAD_SUMS + kind];
    }
  }
  block_sums(sums.blocks, scratch.sums);
  if (arguments.debiased) {
#pragma unroll
    for (int kind = 0; kind < ROW_SUMS; ++kind) {
      for (int i = threadIdx.x; i < arguments.row_programs; i += HEAD_THREADS) {
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
  sums.pivot_energy_x = statistics[PIVOT_X];
  sums.pivot_energy_y = statistics[PIVOT_Y];
  if (threadIdx.x == 0) {
    *arguments.value =
        cka_large_head(sums, arguments.rows, scales.x, scales.y, scales.t, arguments.debiased,
                       arguments.distance, arguments.high, arguments.scalars);
  }
}

__global__ void __launch_bounds__(HEAD_THREADS)
    cka_large_head_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  auto& scratch = *reinterpret_cast<HeadScratch*>(shared_memory());
  double statistics[STATISTICS];
  read_statistics(arguments, statistics, scratch.sums);
  UnitScales scales{inverse_scale(statistics[ENERGY_X], statistics[PIVOT_X]),
                    inverse_scale(statistics[ENERGY_Y], statistics[PIVOT_Y]), 0};
  if (arguments.x.width == arguments.y.width) {
    // Regression coefficients of features of unit norm are one number both ways.
    scales.t = static_cast<float>(statistics[ENERGY_XY] * scales.x * scales.y);
  }
  if (static_cast<int>(blockIdx.x) < arguments.strip_programs()) {
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
    const int at = (blockIdx.x - arguments.strip_programs()) * HEAD_THREADS + threadIdx.x;
    float total = 0;
    for (int program = 0; program < arguments.row_programs; ++program) {
      total += arguments.weighted[static_cast<long long>(program) * 4 * arguments.width + at];
    }
    arguments.weights[at] = total;
  }
  // The last block to come here sees what all have left: a fence covers what others of its block have
  // written only behind the barrier that tells of it.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    scratch.last = atomicAdd(arguments.counters, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!scratch.last) return;
  finish(arguments, scales, statistics, scratch);
}

}  // namespace rift
