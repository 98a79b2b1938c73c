// One side's gradient of linear CKA in covariance form on Hopper: both products in one accumulator.
//
//   grad = g * (scale * (W P + Other R) + w * own),    W = c own + c' other
//
// `own` and `other` centered, P and R given as two bfloat16 each (the planes of covariance_head). A
// block owns 128 x 128 of the gradient: one thread fetches by the copy engine, two warpgroups multiply
// 64 rows each. W is formed in float32 in the registers that multiply it; `other` goes in as it is, and
// what its means add to every row comes off at the end. The low halves are multiplied where the
// scalars say so.
//
// Bytes: per tile own and other once for W and other once more, P and R once or with their low halves.
#pragma once

#include "covariance_layout.h"
#include "sm90.cuh"
#include "types.cuh"

namespace rift {

constexpr int BACKWARD_ROWS = 128;
constexpr int BACKWARD_STAGES = 4;
// 64 columns of 128 rows of features; 64 rows of 128 columns of a plane.
constexpr int FEATURES_BYTES = BACKWARD_ROWS * BOX_COLUMNS * 2;
constexpr int BACKWARD_STAGE_BYTES = 2 * FEATURES_BYTES + OPERAND_BYTES;
struct BackwardScratch {
  Mbarrier full[BACKWARD_STAGES], empty[BACKWARD_STAGES];
  float shift[MOMENT_BLOCK], weights[MOMENT_BLOCK];
};
constexpr int BACKWARD_SHARED =
    1024 + BACKWARD_STAGES * BACKWARD_STAGE_BYTES + static_cast<int>(sizeof(BackwardScratch));

struct BackwardArguments {
  CovarianceArguments forward;
  const float* incoming;
  unsigned short* grad;  // (rows, width) contiguous
  int side;              // 0: of X
};

RIFT_BOTH constexpr unsigned backward_programs(const CovarianceArguments& forward, int side) {
  const int width = side == 0 ? forward.x.width : forward.y.width;
  return static_cast<unsigned>((forward.rows + BACKWARD_ROWS - 1) / BACKWARD_ROWS *
                               ((width + MOMENT_BLOCK - 1) / MOMENT_BLOCK));
}

struct BackwardMaps {
  TensorMap own, other, planes;
};

// What one step multiplies: 64 of the inner dimension.
struct BackwardStep {
  bool is_own;  // W P, else Other R
  int turn;     // high times high, high times low, low times high
  int inner;    // where it begins
};

// All steps of a tile in their order; the same for who fetches and who multiplies.
struct BackwardSteps {
  int own_steps, other_steps, own_turns, other_turns;

  __device__ int count() const { return own_steps * own_turns + other_steps * other_turns; }

  __device__ BackwardStep at(int step) const {
    const bool is_own = step < own_steps * own_turns;
    const int within = is_own ? step : step - own_steps * own_turns;
    const int steps = is_own ? own_steps : other_steps;
    return {is_own, within / steps, within % steps * BOX_COLUMNS};
  }
};

struct BackwardBlock {
  unsigned char* stages;
  BackwardScratch* scratch;
  BackwardSteps steps;
  int row, column;
  bool near;

  __device__ unsigned char* own(int stage) const { return stages + stage * BACKWARD_STAGE_BYTES; }
  __device__ unsigned char* other(int stage) const { return own(stage) + FEATURES_BYTES; }
  __device__ unsigned char* plane(int stage) const { return other(stage) + FEATURES_BYTES; }
};

__device__ inline void fetch_backward(const BackwardArguments& arguments, const BackwardMaps& maps,
                                      const BackwardBlock& block) {
  const int width = arguments.forward.width;
  int stage = 0;
  unsigned parity = 0;
  for (int i = 0; i < block.steps.count(); ++i) {
    const BackwardStep step = block.steps.at(i);
    Mbarrier* full = block.scratch->full + stage;
    wait_barrier(block.scratch->empty + stage, parity ^ 1);
    const bool has_other = !step.is_own || block.near;
    arrive_and_expect(full, OPERAND_BYTES + (step.is_own + has_other) * FEATURES_BYTES);
    if (step.is_own) copy_box(block.own(stage), &maps.own, step.inner, block.row, full);
    if (has_other) copy_box(block.other(stage), &maps.other, step.inner, block.row, full);
    // The high half of P and R, then the low one.
    const int plane_row = (step.turn == 1 ? 2 * width : 0) + (step.is_own ? 0 : width) + step.inner;
    for (int box = 0; box < 2; ++box) {
      copy_box(block.plane(stage) + box * BOX_BYTES, &maps.planes, block.column + box * BOX_COLUMNS,
               plane_row, full);
    }
    if (++stage == BACKWARD_STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// Two neighbours of a row of features as they lie in a swizzled box.
__device__ inline void read_features(const unsigned char* box, int row, int column, float (&x)[2]) {
  const int at = row * 128 + column * 2;
  const auto pair = *reinterpret_cast<const uint32_t*>(box + (at ^ (row % 8) << 4));
  x[0] = bits_to_float(pair << 16);
  x[1] = bits_to_float(pair & 0xFFFF0000);
}

__device__ inline void multiply_backward(const BackwardArguments& arguments,
                                         const BackwardBlock& block, int half) {
  const CovarianceArguments& forward = arguments.forward;
  const float* scalars = forward.scalars + arguments.side * SCALARS;
  const float c_own = scalars[OWN], c_other = block.near ? scalars[OTHER] : 0;
  const bool full = scalars[FULL] != 0, is_y = arguments.side == 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x - 128;
  const int width = forward.width;
  const CovarianceSide& own_side = is_y ? forward.y : forward.x;
  const float* means = forward.means;
  const float *mean_own = means + is_y * width, *mean_other = means + !is_y * width;

  // Per column, for the end: the means' share, and the rows' weighted sums.
  if (thread < MOMENT_BLOCK) {
    const int column = block.column + thread;
    const float* shift = (is_y ? forward.shift_y : forward.shift_x) + column;
    const int parts = is_y ? (forward.x.width + STRIP - 1) / STRIP
                           : (forward.y.width + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
    const long long low = static_cast<long long>(width / STRIP) * width;
    float total = 0;
    for (int part = 0; part < parts; ++part) {
      total += shift[part * width];
      if (full) total += shift[low + part * width];
    }
    block.scratch->shift[thread] = total;
    float weights = 0;
    if (forward.debiased) {
      const float* sums = forward.weights + 2 * arguments.side * width + column;
      weights = scalars[ROW_OWN] * sums[0] + scalars[ROW_OTHER] * sums[width];
    }
    block.scratch->weights[thread] = weights;
  }
  meet_multipliers();

  float c[64] = {};
  int stage = 0;
  unsigned parity = 0;
  const int row = half * 64 + warp * 16 + lane / 4;
  for (int i = 0; i < block.steps.count(); ++i) {
    const BackwardStep step = block.steps.at(i);
    wait_barrier(block.scratch->full + stage, parity);
    const uint64_t plane = describe(block.plane(stage), BOX_BYTES);
    if (step.is_own) {
      uint32_t w[BOX_COLUMNS / 16][4];
#pragma unroll
      for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int column = k * 16 + lane % 4 * 2 + part / 2 * 8;
          float x[2], y[2] = {};
          read_features(block.own(stage), row + part % 2 * 8, column, x);
          if (block.near) read_features(block.other(stage), row + part % 2 * 8, column, y);
          float sum[2];
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            sum[pair] = c_own * (x[pair] - mean_own[step.inner + column + pair]);
            if (block.near) {
              sum[pair] += c_other * (y[pair] - mean_other[step.inner + column + pair]);
            }
          }
          uint32_t high, low;
          split_pair(sum[0], sum[1], high, low);
          w[k][part] = step.turn == 2 ? low : high;
        }
      }
      begin_products();
#pragma unroll
      for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
        multiply_add(c, w[k], plane + k * (16 * 128 / 16));
      }
    } else {
      const uint64_t other = describe(block.other(stage) + half * 64 * 128, 0);
      begin_products();
#pragma unroll
      for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
        // 16 columns of 2 bytes further in a row.
        multiply_add_rows(c, other + k * (16 * 2 / 16), plane + k * (16 * 128 / 16));
      }
    }
    commit_products();
    wait_products<0>();
    if (lane == 0) arrive(block.scratch->empty + stage);
    if (++stage == BACKWARD_STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }

  const float inverse = scalars[INVERSE_OWN];
  const float g = *arguments.incoming;
  const auto* features = static_cast<const Bf16*>(own_side.features);
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int at = block.row + row + 8 * below;
    if (at >= forward.rows) continue;
    float weight = 0;
    if (forward.debiased) {
      weight = scalars[ROW] +
               scalars[ROW_OWN] * forward.energies[arguments.side * forward.rows + at] +
               scalars[ROW_OTHER] * forward.energies[(1 - arguments.side) * forward.rows + at];
    }
#pragma unroll
    for (int n = 0; n < 32; ++n) {
      const int within = n / 2 * 8 + lane % 4 * 2 + n % 2, column = block.column + within;
      if (column >= own_side.width) continue;
      float value = (c[n / 2 * 4 + 2 * below + n % 2] - block.scratch->shift[within]) *
                    (inverse * scalars[SCALE]) * scalars[INVERSE_OTHER];
      if (forward.debiased) {
        const float x = to_float(features[at * own_side.stride + column]) - mean_own[column];
        const float mean = block.scratch->weights[within] * inverse / static_cast<float>(forward.rows);
        value += (weight * inverse * x - mean) * inverse;
      }
      arguments.grad[static_cast<long long>(at) * own_side.width + column] = round_to_bf16(value * g);
    }
  }
}

__device__ inline void run_backward(const BackwardArguments& arguments, const BackwardMaps& maps) {
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  const CovarianceArguments& forward = arguments.forward;
  const bool is_y = arguments.side == 1;
  const int own_width = is_y ? forward.y.width : forward.x.width;
  const int other_width = is_y ? forward.x.width : forward.y.width;
  const bool full = forward.scalars[arguments.side * SCALARS + FULL] != 0;
  // Programs that share rows run together, and find them in the L2 cache.
  const int blocks = (own_width + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
  BackwardBlock block{};
  block.stages = memory;
  block.scratch =
      reinterpret_cast<BackwardScratch*>(memory + BACKWARD_STAGES * BACKWARD_STAGE_BYTES);
  block.steps = {(own_width + BOX_COLUMNS - 1) / BOX_COLUMNS,
                 (other_width + BOX_COLUMNS - 1) / BOX_COLUMNS, full ? 3 : 1, full ? 2 : 1};
  block.row = blockIdx.x / blocks * BACKWARD_ROWS;
  block.column = blockIdx.x % blocks * MOMENT_BLOCK;
  block.near = own_width == other_width;
  if (threadIdx.x == 0) {
    prefetch(&maps.own);
    prefetch(&maps.other);
    prefetch(&maps.planes);
    for (int stage = 0; stage < BACKWARD_STAGES; ++stage) {
      init_barrier(block.scratch->full + stage, 1);
      // A thread of each warp that multiplies.
      init_barrier(block.scratch->empty + stage, 8);
    }
    fence_barriers();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    if (threadIdx.x == 0) fetch_backward(arguments, maps, block);
  } else {
    multiply_backward(arguments, block, group - 1);
  }
}

__global__ void __launch_bounds__(MOMENT_THREADS, 1)
    backward_sm90_kernel(const __grid_constant__ BackwardArguments arguments,
                         const __grid_constant__ BackwardMaps maps) {
#if defined(RIFT_EMULATOR) || __CUDA_ARCH_FEAT_SM90_ALL
  run_backward(arguments, maps);
#endif
}

}  // namespace rift
