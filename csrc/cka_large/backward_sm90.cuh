// One side's gradient of linear CKA in covariance form on Hopper: see backward.cuh.
//
// A block owns 128 x 256 of the gradient, a cluster two of them, one below the other: one thread of a
// block fetches by the copy engine, its own features, and half of P and R for both; two warpgroups
// multiply 64 rows each, both products in one accumulator. W is formed in the registers that multiply
// it, while the products before are still under way.
//
// Bytes: per tile own and other once for W and other once more, half of P and R once or with their
// low halves.
#pragma once

#include "cka_large/backward.cuh"
#include "common/elements.cuh"
#include "common/pipeline_state.h"
#include "common/sm90.cuh"

namespace rift {

constexpr int BACKWARD_COLUMNS = CLUSTER_SIZE * MOMENT_BLOCK;
constexpr int BACKWARD_STAGES = 3;
// 64 columns of 128 rows of features; 64 rows of 256 columns of a plane.
constexpr int FEATURES_BYTES = BACKWARD_ROWS * BOX_COLUMNS * 2;
constexpr int PLANE_BYTES = CLUSTER_SIZE * OPERAND_BYTES;
constexpr int BACKWARD_STAGE_BYTES = 2 * FEATURES_BYTES + PLANE_BYTES;
struct BackwardScratch {
  Mbarrier full[BACKWARD_STAGES], empty[BACKWARD_STAGES];
  BackwardColumn columns[BACKWARD_COLUMNS];
};
constexpr int BACKWARD_SHARED =
    1024 + BACKWARD_STAGES * BACKWARD_STAGE_BYTES + static_cast<int>(sizeof(BackwardScratch));

// Clusters of two blocks.
RIFT_HOST_DEVICE constexpr int backward_clusters(const CkaLargeArguments& forward, int side) {
  const int width = side == 0 ? forward.x.width : forward.y.width;
  return ceil_div(forward.rows, CLUSTER_SIZE * BACKWARD_ROWS) * ceil_div(width, BACKWARD_COLUMNS);
}

struct BackwardMaps {
  TensorMap own, other, planes;
};

struct BackwardBlock {
  unsigned char* stages;
  BackwardScratch* scratch;
  BackwardSteps steps;
  int row, column, rank;

  __device__ unsigned char* own(int stage) const { return stages + stage * BACKWARD_STAGE_BYTES; }
  __device__ unsigned char* other(int stage) const { return own(stage) + FEATURES_BYTES; }
  __device__ unsigned char* plane(int stage) const { return other(stage) + FEATURES_BYTES; }
};

__device__ inline void fetch_backward(const BackwardArguments& arguments, const BackwardMaps& maps,
                                      const BackwardBlock& block) {
  PipelineState<BACKWARD_STAGES> state;
  for (int i = 0; i < block.steps.count(); ++i, state.advance()) {
    const BackwardStep step = block.steps.at(i);
    Mbarrier* full = block.scratch->full + state.stage;
    wait_barrier(block.scratch->empty + state.stage, state.parity ^ 1);
    const bool has_other = !step.is_own || arguments.equal_widths();
    arrive_expect_tx(full, PLANE_BYTES + (step.is_own + has_other) * FEATURES_BYTES);
    if (step.is_own) copy_box(block.own(state.stage), &maps.own, step.inner, block.row, full);
    if (has_other) copy_box(block.other(state.stage), &maps.other, step.inner, block.row, full);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int box = 2 * block.rank + k;
      copy_box_multicast(block.plane(state.stage) + box * BOX_BYTES, &maps.planes,
                         block.column + box * BOX_COLUMNS, step.plane_row(arguments.forward.width),
                         full);
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

// What a warp's threads need of the means of 64 columns: two neighbours of every 8th column.
struct StepMeans {
  float own[BOX_COLUMNS / 8][2], other[BOX_COLUMNS / 8][2];
};

// One side's gradient, or rather this block's part of it.
struct Backward {
  const BackwardArguments& arguments;
  const BackwardBlock& block;
  int half;  // 64 rows of a warpgroup

  __device__ int first_row() const {
    return half * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  // One column a thread, for the end.
  __device__ void prepare() const {
    const int thread = threadIdx.x - 128;
    block.scratch->columns[thread] = backward_column(arguments, block.column + thread);
    consumer_barrier();
  }

  __device__ StepMeans means_of(const BackwardStep& step) const {
    const int column = step.inner + threadIdx.x % 4 * 2;
    const float* own = arguments.means_of_own() + column;
    const float* other = arguments.means_of_other() + column;
    StepMeans result = {};
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 8; ++k) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        result.own[k][pair] = own[8 * k + pair];
        if (arguments.equal_widths()) result.other[k][pair] = other[8 * k + pair];
      }
    }
    return result;
  }

  // 64 rows and columns of W, as products take them, in their high or in their low halves.
  __device__ void form(const BackwardStep& step, const StepMeans& means, int stage,
                       uint32_t (&w)[BOX_COLUMNS / 16][4]) const {
    const float c_own = arguments.scalar(OWN);
    const float c_other = arguments.equal_widths() ? arguments.scalar(OTHER) : 0;
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int eighth = 2 * k + part / 2, column = 8 * eighth + threadIdx.x % 4 * 2;
        const int row = first_row() + part % 2 * 8;
        float x[2], y[2] = {}, sum[2];
        read_features(block.own(stage), row, column, x);
        if (arguments.equal_widths()) read_features(block.other(stage), row, column, y);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          sum[pair] = c_own * (x[pair] - means.own[eighth][pair]);
          if (arguments.equal_widths())
            sum[pair] += c_other * (y[pair] - means.other[eighth][pair]);
        }
        uint32_t high, low;
        split_pair(sum[0], sum[1], high, low);
        w[k][part] = step.pass == 2 ? low : high;
      }
    }
  }

  // W P: begins the products of one step; `w` stays theirs until those of the next one have begun.
  __device__ void begin_own(int i, const PipelineState<BACKWARD_STAGES>& state, float (&c)[128],
                            uint32_t (&w)[BOX_COLUMNS / 16][4]) const {
    const BackwardStep step = block.steps.at(i);
    // While the features are on their way.
    const StepMeans means = means_of(step);
    wait_barrier(block.scratch->full + state.stage, state.parity);
    form(step, means, state.stage, w);
    const uint64_t plane = matrix_descriptor(block.plane(state.stage), BOX_BYTES);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) multiply_add(c, w[k], plane + k * (16 * 128 / 16));
    warpgroup_commit();
  }

  // Other R: the same.
  __device__ void begin_other(const PipelineState<BACKWARD_STAGES>& state, float (&c)[128]) const {
    wait_barrier(block.scratch->full + state.stage, state.parity);
    const uint64_t other = matrix_descriptor(block.other(state.stage) + half * 64 * 128, 0);
    const uint64_t plane = matrix_descriptor(block.plane(state.stage), BOX_BYTES);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
      // 16 columns of 2 bytes further in a row.
      multiply_add_rows(c, other + k * (16 * 2 / 16), plane + k * (16 * 128 / 16));
    }
    warpgroup_commit();
  }

  // Two loops: what a branch has between products, the compiler waits for.
  __device__ void run() const {
    prepare();
    float c[128] = {};
    uint32_t even[BOX_COLUMNS / 16][4], odd[BOX_COLUMNS / 16][4];
    PipelineState<BACKWARD_STAGES> state;
    int before = -1;
    const auto advance = [&] {
      // Those of the step before are through.
      warpgroup_wait<1>();
      if (before >= 0) release(before);
      before = state.stage;
      state.advance();
    };
    const int own_count = block.steps.own_count(), count = block.steps.count();
    for (int i = 0; i < own_count; i += 2) {
      begin_own(i, state, c, even);
      advance();
      if (i + 1 == own_count) break;
      begin_own(i + 1, state, c, odd);
      advance();
    }
    warpgroup_wait<0>();
    for (int i = own_count; i < count; ++i) {
      begin_other(state, c);
      advance();
    }
    warpgroup_wait<0>();
    release(before);
    store(c);
  }

  __device__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    if (lane < CLUSTER_SIZE) arrive_remote(block.scratch->empty + stage, lane);
  }

  __device__ void store(const float (&c)[128]) const {
    const float g = *arguments.incoming;
    const LongRows long_rows = read_long_rows(arguments.forward);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int row = block.row + first_row() + 8 * below;
      if (row >= arguments.forward.rows) continue;
      const BackwardRow of_row = backward_row(arguments, long_rows, row);
#pragma unroll
      for (int n = 0; n < 64; ++n) {
        const int within = n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2;
        store_gradient(arguments, g, row, block.column + within, c[n / 2 * 4 + 2 * below + n % 2],
                       of_row, long_rows.count, block.scratch->columns[within]);
      }
    }
  }
};

__device__ inline void run_backward(const BackwardArguments& arguments, const BackwardMaps& maps) {
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  // Clusters that share rows run together, and find them in the L2 cache.
  const int across = ceil_div(arguments.own().width, BACKWARD_COLUMNS);
  const int pair = static_cast<int>(blockIdx.x) / CLUSTER_SIZE;
  BackwardBlock block{};
  block.stages = memory;
  block.scratch =
      reinterpret_cast<BackwardScratch*>(memory + BACKWARD_STAGES * BACKWARD_STAGE_BYTES);
  block.steps = backward_steps(arguments, BOX_COLUMNS);
  block.rank = static_cast<int>(blockIdx.x) % CLUSTER_SIZE;
  block.row = (pair / across * CLUSTER_SIZE + block.rank) * BACKWARD_ROWS;
  block.column = pair % across * BACKWARD_COLUMNS;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.own);
    prefetch_tensor_map(&maps.other);
    prefetch_tensor_map(&maps.planes);
    for (int stage = 0; stage < BACKWARD_STAGES; ++stage) {
      init_barrier(block.scratch->full + stage, 1);
      // A thread of each warp that multiplies, of both blocks.
      init_barrier(block.scratch->empty + stage, CLUSTER_SIZE * 8);
    }
    fence_barrier_init();
  }
  __syncwarp();
  cluster_barrier();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    deallocate_registers();
    if (threadIdx.x == 0) fetch_backward(arguments, maps, block);
  } else {
    allocate_registers();
    Backward{arguments, block, group - 1}.run();
  }
  // Nobody leaves while the other block may still write into its memory.
  __syncwarp();
  cluster_barrier();
}

// Clusters of CLUSTER_SIZE blocks.
__global__ void __launch_bounds__(MOMENT_THREADS, 1)
    backward_sm90_kernel(const __grid_constant__ BackwardArguments arguments,
                         const __grid_constant__ BackwardMaps maps) {
#if defined(RIFT_EMULATOR) || __CUDA_ARCH_FEAT_SM90_ALL
  run_backward(arguments, maps);
#endif
}

}  // namespace rift
