// Sums and energies of columns, which linear CKA in covariance form needs besides second moments.
//
// They are computed about a pivot: for each column, the median of its elements in three rows. It is
// near the mean, however far that is from 0, unless two of the three elements are far from it. If
// all rows are equal, it is the mean itself, and the energy about it is exactly 0.
//
// Memory traffic: the features once.
#pragma once

#include "cka_large/feature_stream.cuh"
#include "common/reduce.cuh"

namespace rift {

constexpr int STATISTICS_THREADS = 256;
constexpr int STATISTICS_SLOTS = 4;
using StatisticsStream = FeatureStream<STATISTICS_THREADS, 1, STATISTICS_SLOTS>;

// Between the first and the second halves of eight columns, which lie apart: so threads that write
// four columns, and threads that read one, use all banks.
constexpr int PART_GAP = 16;
constexpr int SECOND_HALVES = STATISTICS_COLUMNS / 2 + PART_GAP;

union StatisticsScratch {
  unsigned char stream[StatisticsStream::BYTES];
  struct {
    float parts[STATISTICS_THREADS / 32][5][STATISTICS_COLUMNS + PART_GAP];
    double sums[STATISTICS * STATISTICS_THREADS / 32];
  } end;
};

__device__ inline float median(float a, float b, float c) {
  return max(min(a, b), min(max(a, b), c));
}

// A block owns 128 columns of both sides in a segment of rows, and a thread 8 of these columns in
// every 16th row.
__global__ void __launch_bounds__(STATISTICS_THREADS, 2)
    statistics_kernel(const __grid_constant__ CkaLargeArguments arguments) {
  constexpr int WARPS = STATISTICS_THREADS / 32, COLUMNS = STATISTICS_COLUMNS, KINDS = 5;
  constexpr int VECTORS = COLUMNS / FEATURE_VECTOR, STEP = STATISTICS_THREADS / VECTORS;
  static_assert(VECTORS == 16);
  auto& scratch = *reinterpret_cast<StatisticsScratch*>(shared_memory());
  const StatisticsStream stream{scratch.stream};
  const int blocks = arguments.width / COLUMNS;
  const int block = blockIdx.x % blocks, segment = blockIdx.x / blocks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x < 2) arguments.counters[threadIdx.x] = 0;
  const int length = ceil_div(arguments.rows, arguments.segments);
  const int begin = min(segment * length, arguments.rows);
  const int end = min(begin + length, arguments.rows);
  const int local_column = threadIdx.x % VECTORS * FEATURE_VECTOR;
  const int column = block * COLUMNS + local_column;
  const FeatureColumns columns_x = feature_columns(arguments.x, column);
  const FeatureColumns columns_y = feature_columns(arguments.y, column);
  const auto fetch = [&](int slot, int row, bool exists) {
    stream.fetch(slot, 0, 0, columns_x, row * arguments.x.stride, exists);
    stream.fetch(slot, 0, 1, columns_y, row * arguments.y.stride, exists);
    commit_copies();
  };
  float pivots[2][FEATURE_VECTOR];
  fetch(0, 0, true);
  fetch(1, arguments.rows / 3, true);
  fetch(2, 2 * arguments.rows / 3, true);
  wait_copies<0>();
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    float rows[3][FEATURE_VECTOR];
#pragma unroll
    for (int i = 0; i < 3; ++i) stream.read(i, 0, side, rows[i]);
#pragma unroll
    for (int i = 0; i < FEATURE_VECTOR; ++i) {
      pivots[side][i] = median(rows[0][i], rows[1][i], rows[2][i]);
    }
    // Lanes 16 apart have the same columns: each stores half of them.
    if (segment == 0 && warp == 0) {
      const float(&x)[FEATURE_VECTOR] = pivots[side];
      float* out = arguments.pivots + side * arguments.width + column + lane / VECTORS * 4;
      *reinterpret_cast<Vector<float, 4>*>(out) =
          lane < VECTORS ? Vector<float, 4>{x[0], x[1], x[2], x[3]}
                         : Vector<float, 4>{x[4], x[5], x[6], x[7]};
    }
  }
  const int first = begin + static_cast<int>(threadIdx.x) / VECTORS;
#pragma unroll
  for (int slot = 0; slot < STATISTICS_SLOTS; ++slot) {
    fetch(slot, first + slot * STEP, first + slot * STEP < end);
  }
  float kinds[KINDS][FEATURE_VECTOR] = {};
  for (int row = first, slot = 0; row < end; row += STEP, slot = (slot + 1) % STATISTICS_SLOTS) {
    float x[FEATURE_VECTOR], y[FEATURE_VECTOR];
    wait_copies<STATISTICS_SLOTS - 1>();
    stream.read(slot, 0, 0, x);
    stream.read(slot, 0, 1, y);
    fetch(slot, row + STATISTICS_SLOTS * STEP, row + STATISTICS_SLOTS * STEP < end);
#pragma unroll
    for (int i = 0; i < FEATURE_VECTOR; ++i) {
      const float a = x[i] - pivots[0][i], b = y[i] - pivots[1][i];
      kinds[0][i] += a;
      kinds[1][i] += b;
      kinds[2][i] += a * a;
      kinds[3][i] += b * b;
      kinds[4][i] += a * b;
    }
  }
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int kind = 0; kind < KINDS; ++kind) {
    // Adds up both rows of the warp. Lanes 0 to 15 receive first halves.
    float(&x)[FEATURE_VECTOR] = kinds[kind];
    scatter_sum<VECTORS, VECTORS>(x);
    const int place = lane % VECTORS * 4 + lane / VECTORS * SECOND_HALVES;
    *reinterpret_cast<Vector<float, 4>*>(scratch.end.parts[warp][kind] + place) = {x[0], x[1], x[2],
                                                                                   x[3]};
  }
  __syncthreads();
  double totals[STATISTICS] = {};
  if (threadIdx.x < COLUMNS) {
    const int thread = threadIdx.x;
    const int place = thread / 8 * 4 + thread % 4 + thread % 8 / 4 * SECOND_HALVES;
    float sums[KINDS] = {};
#pragma unroll
    for (int kind = 0; kind < KINDS; ++kind) {
#pragma unroll
      for (int other = 0; other < WARPS; ++other) {
        sums[kind] += scratch.end.parts[other][kind][place];
      }
    }
    float* out = arguments.sums + segment * arguments.width + block * COLUMNS + threadIdx.x;
    out[0] = sums[0];
    out[arguments.segments * arguments.width] = sums[1];
    const float inverse_count = end > begin ? 1 / static_cast<float>(end - begin) : 0;
    totals[PIVOT_ENERGY_X] = sums[2];
    totals[PIVOT_ENERGY_Y] = sums[3];
    totals[ENERGY_X] = sums[2] - sums[0] * sums[0] * inverse_count;
    totals[ENERGY_Y] = sums[3] - sums[1] * sums[1] * inverse_count;
    totals[ENERGY_XY] = sums[4] - sums[0] * sums[1] * inverse_count;
  }
  const double total = block_sum_of_thread(totals, scratch.end.sums);
  if (threadIdx.x < STATISTICS) {
    arguments.statistics[threadIdx.x * gridDim.x + blockIdx.x] = static_cast<float>(total);
  }
}

}  // namespace rift
