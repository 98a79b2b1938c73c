// Debiased CKA needs terms of single rows: their energies, their products with the long rows, the
// sums of their products with all other rows, and columns weighted with these sums. The moments
// need patches: the chunks of long rows without these rows.
//
// Memory traffic: the features twice, the second time from the L2 cache; 80 bytes for each row; the
// patches.
#pragma once

#include "cka_large/longest.cuh"

namespace rift {

// Rows that a warp processes at once, so that it loads elements of long rows less often.
constexpr int ROWS_AT_ONCE = 4;

// Shared memory: scratch for sums over the block, and the means of both sides.
RIFT_HOST_DEVICE constexpr int row_terms_shared(int width) {
  return ROW_SUMS * STATISTICS_THREADS / 32 * 8 + 2 * width * 4;
}

// Energies of some rows of a side, and their products with the long rows.
struct RowProducts {
  float energy[ROWS_AT_ONCE], products[ROWS_AT_ONCE][MAX_LONG_ROWS];
};

// Computes the products of the rows from `first` on with one warp; rows from `end` on count as 0.
__device__ inline RowProducts row_products(const CkaLargeSide& side, const LongRows& long_rows,
                                           const float* means, float inverse, int first, int end) {
  RowProducts result = {};
  const auto* features = static_cast<const Bf16*>(side.features);
  for (int column = threadIdx.x % 32; column < side.width; column += 32) {
    const auto centered = [&](int row) {
      return (to_float(features[row * side.stride + column]) - means[column]) * inverse;
    };
    float x[ROWS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
      x[i] = first + i < end ? centered(first + i) : 0;
      result.energy[i] += x[i] * x[i];
    }
    if (long_rows.count == 0) continue;
#pragma unroll
    for (int s = 0; s < MAX_LONG_ROWS; ++s) {
      if (s >= long_rows.count) continue;
      const float p = centered(long_rows.rows[s]);
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; ++i) result.products[i][s] += x[i] * p;
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS_AT_ONCE; ++i) {
    result.energy[i] = warp_sum(result.energy[i]);
#pragma unroll
    for (int s = 0; s < MAX_LONG_ROWS; ++s) {
      if (s < long_rows.count) result.products[i][s] = warp_sum(result.products[i][s]);
    }
  }
  return result;
}

// Stores a row's terms and adds them to the sums. Called by one thread.
__device__ inline void add_row(const CkaLargeArguments& arguments, const LongRows& long_rows,
                               int row, const float (&energy)[2], const float (&x)[MAX_LONG_ROWS],
                               const float (&y)[MAX_LONG_ROWS], double (&totals)[ROW_SUMS]) {
  double k = -static_cast<double>(energy[0]), l = -static_cast<double>(energy[1]);
  double xx = 0, yy = 0, xy = 0;
  const bool is_long = long_rows.has(row);
  // A pair of a long and another row counts for both orders. A pair of long rows is visited twice.
  const double orders = is_long ? 1 : 2;
  float* terms = arguments.row_terms + row;
  const long long rows = arguments.rows;
#pragma unroll
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    if (s >= long_rows.count) continue;
    const double a = x[s], b = y[s];
    k += a;
    l += b;
    if (row != long_rows.rows[s]) {
      xx += a * a;
      yy += b * b;
      xy += a * b;
    }
    terms[(ROW_PRODUCTS + s) * rows] = x[s];
    terms[(ROW_PRODUCTS + MAX_LONG_ROWS + s) * rows] = y[s];
  }
  terms[ENERGY * rows] = energy[0];
  terms[(ENERGY + 1) * rows] = energy[1];
  terms[ROW_SUM * rows] = static_cast<float>(k);
  terms[(ROW_SUM + 1) * rows] = static_cast<float>(l);
  totals[SUM_K] += k;
  totals[SUM_L] += l;
  totals[SQUARE_K] += k * k;
  totals[SQUARE_L] += l * l;
  totals[PRODUCT_KL] += k * l;
  const double r = energy[0], q = energy[1];
  totals[PAIRS_XX] += orders * xx - (is_long ? 0 : r * r);
  totals[PAIRS_YY] += orders * yy - (is_long ? 0 : q * q);
  totals[PAIRS_XY] += orders * xy - (is_long ? 0 : r * q);
  totals[REST_X] += is_long ? 0 : r;
  totals[REST_Y] += is_long ? 0 : q;
}

// Copies 128 columns of the chunk of a long row and replaces the long rows in it by 0.
__device__ inline void make_patch(const CkaLargeArguments& arguments, const LongRows& long_rows,
                                  int index) {
  const int blocks = arguments.width / MOMENT_BLOCK;
  const int slot = index / (2 * blocks), is_y = index / blocks % 2;
  const CkaLargeSide& side = is_y ? arguments.y : arguments.x;
  const auto* features = static_cast<const Bf16*>(side.features);
  const long long offset = is_y ? 1LL * PATCH_ROWS * arguments.width : 0;
  unsigned short* patches = arguments.patches + offset;
  const int long_row = arguments.long_rows[slot];
  if (long_row < 0) return;
  const int first = long_row / MOMENT_CHUNK * MOMENT_CHUNK;
  const int column = index % blocks * MOMENT_BLOCK + static_cast<int>(threadIdx.x) % MOMENT_BLOCK;
#pragma unroll 4
  for (int i = threadIdx.x / MOMENT_BLOCK; i < MOMENT_CHUNK; i += blockDim.x / MOMENT_BLOCK) {
    const int row = first + i;
    const bool included = row < arguments.rows && column < side.width && !long_rows.has(row);
    patches[static_cast<long long>(slot * MOMENT_CHUNK + i) * arguments.width + column] =
        included ? features[row * side.stride + column].bits : uint16_t{0};
  }
}

// A block owns a run of rows, or some columns of a patch.
__global__ void __launch_bounds__(STATISTICS_THREADS)
    row_terms_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  constexpr int WARPS = STATISTICS_THREADS / 32;
  const LongRows long_rows = read_long_rows(arguments);
  if (static_cast<int>(blockIdx.x) >= arguments.row_blocks) {
    make_patch(arguments, long_rows, static_cast<int>(blockIdx.x) - arguments.row_blocks);
    return;
  }
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  // The means of X and of Y.
  auto* means = reinterpret_cast<float*>(scratch + ROW_SUMS * WARPS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = arguments.width;
  const RowRun run = row_run(arguments);
  for (int i = threadIdx.x; i < 2 * width; i += blockDim.x) {
    means[i] = column_mean(arguments, long_rows, i >= width, i >= width ? i - width : i);
  }
  double statistics[STATISTICS];
  read_statistics(arguments, statistics, scratch);
  const float inverse[2] = {inverse_scale(statistics[ENERGY_X], statistics[PIVOT_ENERGY_X]),
                            inverse_scale(statistics[ENERGY_Y], statistics[PIVOT_ENERGY_Y])};
  double totals[ROW_SUMS] = {};
  for (int first = run.begin + ROWS_AT_ONCE * warp; first < run.end;
       first += ROWS_AT_ONCE * WARPS) {
    const RowProducts x = row_products(arguments.x, long_rows, means, inverse[0], first, run.end);
    const RowProducts y =
        row_products(arguments.y, long_rows, means + width, inverse[1], first, run.end);
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
      if (lane != 0 || first + i >= run.end) continue;
      const float energy[2] = {x.energy[i], y.energy[i]};
      add_row(arguments, long_rows, first + i, energy, x.products[i], y.products[i], totals);
    }
  }
  // The energies of the means, from one block.
  for (int i = threadIdx.x; i < 2 * width && blockIdx.x == 0; i += blockDim.x) {
    const float scale = i < width ? inverse[0] : inverse[1];
    const double mean = static_cast<double>(means[i]) * static_cast<double>(scale);
    totals[MEAN_X] += i < width ? mean * mean : 0;
    totals[MEAN_Y] += i < width ? 0 : mean * mean;
  }
  block_sums(totals, scratch);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int kind = 0; kind < ROW_SUMS; ++kind) {
      arguments.row_sums[blockIdx.x * ROW_SUMS + kind] = totals[kind];
    }
  }
  // The barrier in block_sums has made the stored terms visible to all threads.
  float* parts = arguments.weighted_parts + static_cast<long long>(blockIdx.x) * 4 * width;
  const CkaLargeSide sides[2] = {arguments.x, arguments.y};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const auto* features = static_cast<const Bf16*>(sides[side].features);
    const float* sums = arguments.row_terms + static_cast<long long>(ROW_SUM) * arguments.rows;
    const float* own_sums = sums + side * arguments.rows;
    const float* other_sums = sums + (1 - side) * arguments.rows;
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
      float total_own = 0, total_other = 0;
      for (int row = run.begin; row < run.end && column < sides[side].width; ++row) {
        if (long_rows.count > 0 && long_rows.has(row)) continue;
        const float x =
            to_float(features[row * sides[side].stride + column]) - means[side * width + column];
        total_own += own_sums[row] * x;
        total_other += other_sums[row] * x;
      }
      parts[2 * side * width + column] = total_own;
      parts[(2 * side + 1) * width + column] = total_other;
    }
  }
}

}  // namespace rift
