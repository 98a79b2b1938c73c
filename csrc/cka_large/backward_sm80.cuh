// One side's gradient of linear CKA in covariance form by mma.sync, for any GPU from sm_80 on; see
// backward.cuh.
//
// A block owns 128 x 128 elements of the gradient and sums both products in one accumulator. All
// its threads prefetch steps of 32 by cp.async into a circular buffer of stages. W is formed in
// registers.
//
// Memory traffic for each tile: own and other features once for W, other features once more; P and
// R once, or also their low halves.
#pragma once

#include "cka_large/backward.cuh"
#include "cka_large/tiles_sm80.cuh"

namespace rift {

constexpr int BACKWARD_RING_STEP = 32;
constexpr int BACKWARD_RING_STAGES = 4;
constexpr int BACKWARD_RING_OPERAND = TILE * BACKWARD_RING_STEP * 2;
constexpr int BACKWARD_RING_STAGE = 3 * BACKWARD_RING_OPERAND;
static_assert(TILE == BACKWARD_ROWS);
// The stages and the columns after them fit the 99 KiB of sm_86 and sm_89.
constexpr int BACKWARD_RING_SHARED =
    BACKWARD_RING_STAGES * BACKWARD_RING_STAGE + TILE * static_cast<int>(sizeof(BackwardColumn));
static_assert(BACKWARD_RING_SHARED <= 99 * 1024);

RIFT_HOST_DEVICE constexpr int backward_tiles(const CkaLargeArguments& forward, int side) {
  const int width = side == 0 ? forward.x.width : forward.y.width;
  return ceil_div(forward.rows, TILE) * ceil_div(width, TILE);
}

struct BackwardMatrices {
  Matrix own, other, planes;
};

struct BackwardRing {
  const BackwardArguments& arguments;
  const BackwardMatrices& matrices;
  unsigned char* memory;
  BackwardSteps steps;
  int row, column;

  __device__ unsigned char* own_features(int stage) const {
    return memory + stage * BACKWARD_RING_STAGE;
  }
  __device__ unsigned char* other_features(int stage) const {
    return own_features(stage) + BACKWARD_RING_OPERAND;
  }
  __device__ unsigned char* plane(int stage) const {
    return other_features(stage) + BACKWARD_RING_OPERAND;
  }
  __device__ BackwardColumn* columns() const {
    return reinterpret_cast<BackwardColumn*>(own_features(BACKWARD_RING_STAGES));
  }

  // Starts to fetch a step. If there is none, it commits an empty group, so that groups can still
  // be counted.
  __device__ void fetch(int i) const {
    if (i < steps.count()) {
      constexpr int STEP = BACKWARD_RING_STEP;
      const BackwardStep step = steps.at(i);
      const int stage = i % BACKWARD_RING_STAGES;
      if (step.is_own) fetch_tile<TILE, STEP>(own_features(stage), matrices.own, row, step.inner);
      if (!step.is_own || arguments.equal_widths()) {
        fetch_tile<TILE, STEP>(other_features(stage), matrices.other, row, step.inner);
      }
      fetch_tile<STEP, TILE>(plane(stage), matrices.planes, step.plane_row(arguments.forward.width),
                             column);
    }
    commit_copies();
  }

  // Forms the high or low halves of 16 columns of W for this warp's 64 rows.
  __device__ void form(Fragments& fragments, const BackwardStep& step, int stage, int inner) const {
    const float c_own = arguments.scalar(W_OWN);
    const float c_other = arguments.equal_widths() ? arguments.scalar(W_OTHER) : 0;
    // Means of this lane's columns: two adjacent ones, and the same 8 columns further.
    float mean_own[2][2], mean_other[2][2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int mean_column = step.inner + inner + threadIdx.x % 4 * 2 + n / 2 * 8 + n % 2;
      mean_own[n / 2][n % 2] = arguments.own_means()[mean_column];
      if (arguments.equal_widths()) mean_other[n / 2][n % 2] = arguments.other_means()[mean_column];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t x[4], y[4] = {};
      load_inner_columns<BACKWARD_RING_STEP>(x, own_features(stage), warp_row() + 16 * i, inner);
      if (arguments.equal_widths()) {
        load_inner_columns<BACKWARD_RING_STEP>(y, other_features(stage), warp_row() + 16 * i,
                                               inner);
      }
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float sum[2];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const float own_x = bits_to_float(pair ? x[part] & 0xFFFF0000 : x[part] << 16);
          const float other_x = bits_to_float(pair ? y[part] & 0xFFFF0000 : y[part] << 16);
          sum[pair] = c_own * (own_x - mean_own[part / 2][pair]);
          if (arguments.equal_widths())
            sum[pair] += c_other * (other_x - mean_other[part / 2][pair]);
        }
        uint32_t high, low;
        split_pair(sum[0], sum[1], high, low);
        fragments.a[i][part] = step.pass == 2 ? low : high;
      }
    }
  }

  __device__ void multiply(float (&c)[4][4][4], int step_number) const {
    const BackwardStep step = steps.at(step_number);
    const int stage = step_number % BACKWARD_RING_STAGES;
#pragma unroll
    for (int inner = 0; inner < BACKWARD_RING_STEP; inner += 16) {
      Fragments fragments;
      load_right(fragments, plane(stage), inner);
      if (step.is_own) {
        form(fragments, step, stage, inner);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          load_inner_columns<BACKWARD_RING_STEP>(fragments.a[i], other_features(stage),
                                                 warp_row() + 16 * i, inner);
        }
      }
      multiply_add(c, fragments);
    }
  }

  __device__ void store(const float (&c)[4][4][4]) const {
    const float incoming = *arguments.incoming;
    const int lane = threadIdx.x % 32;
    const LongRows long_rows = read_long_rows(arguments.forward);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int grad_row = row + warp_row() + 8 * i + lane / 4;
      if (grad_row >= arguments.forward.rows) continue;
      const BackwardRow of_row = backward_row(arguments, long_rows, grad_row);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int tile_column = warp_column() + 8 * (j / 2) + lane % 4 * 2 + j % 2;
        store_gradient(arguments, incoming, grad_row, column + tile_column,
                       c[i / 2][j / 2][i % 2 * 2 + j % 2], of_row, long_rows.count,
                       columns()[tile_column]);
      }
    }
  }
};

__global__ void __launch_bounds__(TILE_THREADS, 1)
    backward_sm80_kernel(const __grid_constant__ BackwardArguments arguments,
                         const __grid_constant__ BackwardMatrices matrices) {
  // Blocks with the same rows run at the same time, so that these are in the L2 cache.
  const int across = ceil_div(arguments.own_side().width, TILE);
  const int row = static_cast<int>(blockIdx.x) / across * TILE;
  const int column = static_cast<int>(blockIdx.x) % across * TILE;
  const BackwardSteps steps = backward_steps(arguments, BACKWARD_RING_STEP);
  const BackwardRing ring{arguments, matrices, shared_memory(), steps, row, column};
  constexpr int AHEAD = BACKWARD_RING_STAGES - 1;
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) ring.fetch(i);
  // The barriers below make these visible to all threads.
  if (threadIdx.x < TILE) {
    ring.columns()[threadIdx.x] =
        backward_column(arguments, column + static_cast<int>(threadIdx.x));
  }
  float c[4][4][4] = {};
  for (int i = 0; i < steps.count(); ++i) {
    // After this, the step is in shared memory, and no thread uses the previous one, so that its
    // stage is free.
    wait_copies<AHEAD - 1>();
    __syncthreads();
    ring.fetch(i + AHEAD);
    ring.multiply(c, i);
  }
  ring.store(c);
  wait_copies<0>();
}

}  // namespace rift
