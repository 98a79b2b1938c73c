// One side's gradient of linear CKA in covariance form on Hopper; see backward.cuh.
//
// A block owns 128 x 256 elements of the gradient; the two blocks of a cluster own the same
// columns. The producer thread of a block copies this block's rows of features, and half of P and R
// for both blocks (multicast). Two consumer warpgroups compute 64 rows each and sum both products
// in one accumulator. They form W in registers, while the previous products are still running.
//
// Memory traffic for each tile: own and other features once for W, other features once more; half
// of P and R once, or also their low halves.
#pragma once

#include "cka_large/backward.cuh"
#include "common/elements.cuh"
#include "common/pipeline_state.h"
#include "common/sm90.cuh"

namespace rift {

constexpr int BACKWARD_COLUMNS = CLUSTER_SIZE * MOMENT_BLOCK;
constexpr int BACKWARD_STAGES = 3;
// 64 columns of 128 rows of features, and 64 rows of 256 columns of a plane.
constexpr int FEATURES_BYTES = BACKWARD_ROWS * BOX_COLUMNS * 2;
constexpr int PLANE_BYTES = CLUSTER_SIZE * OPERAND_BYTES;
constexpr int BACKWARD_STAGE_BYTES = 2 * FEATURES_BYTES + PLANE_BYTES;

// What lies after the stages in shared memory.
struct BackwardScratch {
  Mbarrier full[BACKWARD_STAGES], empty[BACKWARD_STAGES];
  BackwardColumn columns[BACKWARD_COLUMNS];
};
constexpr int BACKWARD_SHARED =
    1024 + BACKWARD_STAGES * BACKWARD_STAGE_BYTES + static_cast<int>(sizeof(BackwardScratch));

// The number of clusters.
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

  __device__ unsigned char* own_features(int stage) const {
    return stages + stage * BACKWARD_STAGE_BYTES;
  }
  __device__ unsigned char* other_features(int stage) const {
    return own_features(stage) + FEATURES_BYTES;
  }
  __device__ unsigned char* plane(int stage) const {
    return other_features(stage) + FEATURES_BYTES;
  }
};

// The producer thread.
__device__ inline void fetch_backward(const BackwardArguments& arguments, const BackwardMaps& maps,
                                      const BackwardBlock& block) {
  PipelineState<BACKWARD_STAGES> state;
  for (int i = 0; i < block.steps.count(); ++i, state.advance()) {
    const BackwardStep step = block.steps.at(i);
    Mbarrier* full = block.scratch->full + state.stage;
    wait_barrier(block.scratch->empty + state.stage, state.parity ^ 1);
    const bool has_other = !step.is_own || arguments.equal_widths();
    arrive_expect_tx(full, PLANE_BYTES + (step.is_own + has_other) * FEATURES_BYTES);
    if (step.is_own)
      copy_box(block.own_features(state.stage), &maps.own, step.inner, block.row, full);
    if (has_other)
      copy_box(block.other_features(state.stage), &maps.other, step.inner, block.row, full);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int box = 2 * block.rank + k;
      copy_box_multicast(block.plane(state.stage) + box * BOX_BYTES, &maps.planes,
                         block.column + box * BOX_COLUMNS, step.plane_row(arguments.forward.width),
                         full);
    }
  }
}

// Reads two adjacent features of a row from a swizzled box.
__device__ inline void read_features(const unsigned char* box, int row, int column, float (&x)[2]) {
  const int offset = row * 128 + column * 2;
  const auto pair = *reinterpret_cast<const uint32_t*>(box + (offset ^ (row % 8) << 4));
  x[0] = bits_to_float(pair << 16);
  x[1] = bits_to_float(pair & 0xFFFF0000);
}

// The means that a thread needs for 64 columns: those of two adjacent columns out of every eight.
struct StepMeans {
  float own[BOX_COLUMNS / 8][2], other[BOX_COLUMNS / 8][2];
};

// A consumer warpgroup.
struct BackwardConsumer {
  const BackwardArguments& arguments;
  const BackwardBlock& block;
  int half;  // index of its 64 rows in the block

  __device__ int first_row() const {
    return half * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  // Prepares what store() needs of the columns, one column per thread.
  __device__ void prepare() const {
    const int thread = threadIdx.x - 128;
    block.scratch->columns[thread] = backward_column(arguments, block.column + thread);
    consumer_barrier();
  }

  __device__ StepMeans step_means(const BackwardStep& step) const {
    const int column = step.inner + threadIdx.x % 4 * 2;
    const float* own_means = arguments.own_means() + column;
    const float* other_means = arguments.other_means() + column;
    StepMeans result = {};
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 8; ++k) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        result.own[k][pair] = own_means[8 * k + pair];
        if (arguments.equal_widths()) result.other[k][pair] = other_means[8 * k + pair];
      }
    }
    return result;
  }

  // Forms the high or low halves of 64 rows and columns of W, as operands of WGMMA.
  __device__ void form(const BackwardStep& step, const StepMeans& means, int stage,
                       uint32_t (&w)[BOX_COLUMNS / 16][4]) const {
    const float c_own = arguments.scalar(W_OWN);
    const float c_other = arguments.equal_widths() ? arguments.scalar(W_OTHER) : 0;
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int eighth = 2 * k + part / 2, column = 8 * eighth + threadIdx.x % 4 * 2;
        const int row = first_row() + part % 2 * 8;
        float x[2], y[2] = {}, sum[2];
        read_features(block.own_features(stage), row, column, x);
        if (arguments.equal_widths()) read_features(block.other_features(stage), row, column, y);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          sum[pair] = c_own * (x[pair] - means.own[eighth][pair]);
          if (arguments.equal_widths()) {
            sum[pair] += c_other * (y[pair] - means.other[eighth][pair]);
          }
        }
        uint32_t high, low;
        split_pair(sum[0], sum[1], high, low);
        w[k][part] = step.pass == 2 ? low : high;
      }
    }
  }

  // Starts the products of one step of W P. They read `w` until they are complete, which they are
  // one step later.
  __device__ void begin_own(int i, const PipelineState<BACKWARD_STAGES>& state, float (&c)[128],
                            uint32_t (&w)[BOX_COLUMNS / 16][4]) const {
    const BackwardStep step = block.steps.at(i);
    // Read while the features are still being copied.
    const StepMeans means = step_means(step);
    wait_barrier(block.scratch->full + state.stage, state.parity);
    form(step, means, state.stage, w);
    const uint64_t plane = matrix_descriptor(block.plane(state.stage), BOX_BYTES);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) multiply_add(c, w[k], plane + k * (16 * 128 / 16));
    warpgroup_commit();
  }

  // Starts the products of one step of Other R.
  __device__ void begin_other(const PipelineState<BACKWARD_STAGES>& state, float (&c)[128]) const {
    wait_barrier(block.scratch->full + state.stage, state.parity);
    const uint64_t features =
        matrix_descriptor(block.other_features(state.stage) + half * 64 * 128, 0);
    const uint64_t plane = matrix_descriptor(block.plane(state.stage), BOX_BYTES);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
      // Advances by 16 columns of 2 bytes, and by 16 rows of 128 bytes.
      multiply_add_rows(c, features + k * (16 * 2 / 16), plane + k * (16 * 128 / 16));
    }
    warpgroup_commit();
  }

  // W P and Other R have separate loops: where a branch lies between products, the compiler inserts
  // waits.
  __device__ void run() const {
    prepare();
    float c[128] = {};
    uint32_t even[BOX_COLUMNS / 16][4], odd[BOX_COLUMNS / 16][4];
    PipelineState<BACKWARD_STAGES> state;
    int previous = -1;
    const auto finish_previous = [&] {
      warpgroup_wait<1>();
      if (previous >= 0) release(previous);
      previous = state.stage;
      state.advance();
    };
    const int own_count = block.steps.own_count(), count = block.steps.count();
    for (int i = 0; i < own_count; i += 2) {
      begin_own(i, state, c, even);
      finish_previous();
      if (i + 1 == own_count) break;
      begin_own(i + 1, state, c, odd);
      finish_previous();
    }
    warpgroup_wait<0>();
    for (int i = own_count; i < count; ++i) {
      begin_other(state, c);
      finish_previous();
    }
    warpgroup_wait<0>();
    release(previous);
    store(c);
  }

  __device__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    if (lane < CLUSTER_SIZE) arrive_remote(block.scratch->empty + stage, lane);
  }

  __device__ void store(const float (&c)[128]) const {
    const float incoming = *arguments.incoming;
    const LongRows long_rows = read_long_rows(arguments.forward);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int row = block.row + first_row() + 8 * below;
      if (row >= arguments.forward.rows) continue;
      const BackwardRow of_row = backward_row(arguments, long_rows, row);
#pragma unroll
      for (int n = 0; n < 64; ++n) {
        const int column = n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2;
        store_gradient(arguments, incoming, row, block.column + column,
                       c[n / 2 * 4 + 2 * below + n % 2], of_row, long_rows.count,
                       block.scratch->columns[column]);
      }
    }
  }
};

__device__ inline void run_backward(const BackwardArguments& arguments, const BackwardMaps& maps) {
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  // Clusters with the same rows run at the same time, so that these are in the L2 cache.
  const int across = ceil_div(arguments.own_side().width, BACKWARD_COLUMNS);
  const int cluster = static_cast<int>(blockIdx.x) / CLUSTER_SIZE;
  BackwardBlock block{};
  block.stages = memory;
  block.scratch =
      reinterpret_cast<BackwardScratch*>(memory + BACKWARD_STAGES * BACKWARD_STAGE_BYTES);
  block.steps = backward_steps(arguments, BOX_COLUMNS);
  block.rank = static_cast<int>(blockIdx.x) % CLUSTER_SIZE;
  block.row = (cluster / across * CLUSTER_SIZE + block.rank) * BACKWARD_ROWS;
  block.column = cluster % across * BACKWARD_COLUMNS;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.own);
    prefetch_tensor_map(&maps.other);
    prefetch_tensor_map(&maps.planes);
    for (int stage = 0; stage < BACKWARD_STAGES; ++stage) {
      init_barrier(block.scratch->full + stage, 1);
      // One thread of each consumer warp arrives, in both blocks.
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
    BackwardConsumer{arguments, block, group - 1}.run();
  }
  // A block must not exit while the other may still access its shared memory.
  __syncwarp();
  cluster_barrier();
}

// Launched as clusters of CLUSTER_SIZE blocks. Empty unless compiled for sm_90a.
__global__ void __launch_bounds__(MOMENT_THREADS, 1)
    backward_sm90_kernel(const __grid_constant__ BackwardArguments arguments,
                         const __grid_constant__ BackwardMaps maps) {
#if defined(RIFT_EMULATOR) || __CUDA_ARCH_FEAT_SM90_ALL
  run_backward(arguments, maps);
#endif
}

}  // namespace rift
