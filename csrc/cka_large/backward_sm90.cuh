// One side's gradient of linear CKA in covariance form on Hopper; see backward.cuh.
//
// The two blocks of a cluster compute tiles of 128 x 256 elements with the same columns, one pair
// of tiles after another. Each multiprocessor runs one block. Its warps have roles:
//
//   warp 0       copies this block's rows of features, and half of P and R for both blocks
//                (multicast), into a circular buffer of stages
//   warp 1       computes the constant terms of W
//   warps 2, 3   compute what a tile's columns and its rows have in common
//   warps 4-11   two consumer warpgroups: compute 64 rows each, and sum both products in one
//                accumulator. They form W in registers, while earlier products are running
//
// The last stage of a tile has the features of the tile itself. The gradient takes their place
// before it is written, while the stages of the next tile are filled.
//
// Memory traffic for each tile: own and other features once for W, other features once more; half
// of P and R once, or also their low halves; the tile's features once.
#pragma once

#include "cka_large/backward_tile.cuh"
#include "cka_large/backward_units.cuh"
#include "common/elements.cuh"
#include "common/pipeline_state.h"
#include "common/sm90.cuh"

namespace rift {

constexpr int BACKWARD_STAGES = 3;
constexpr int CONSUMER_WARPS = 8;
// 64 columns of 128 rows of features, and 64 rows of 256 columns of a plane.
constexpr int FEATURES_BYTES = BACKWARD_ROWS * BOX_COLUMNS * 2;
constexpr int PLANE_BYTES = CLUSTER_SIZE * OPERAND_BYTES;
constexpr int BACKWARD_STAGE_BYTES = 2 * FEATURES_BYTES + PLANE_BYTES;
static_assert(BACKWARD_COLUMNS / BOX_COLUMNS * FEATURES_BYTES <= BACKWARD_STAGE_BYTES);

// What lies after the stages in shared memory.
struct BackwardScratch {
  Mbarrier full[BACKWARD_STAGES], empty[BACKWARD_STAGES], terms_full, terms_empty;
  float constants[BACKWARD_STAGES][BOX_COLUMNS];  // of W
  BackwardTerms<BACKWARD_COLUMNS> terms;
  BackwardLongRows<BACKWARD_COLUMNS> long_rows;
};
constexpr int BACKWARD_SHARED =
    1024 + BACKWARD_STAGES * BACKWARD_STAGE_BYTES + static_cast<int>(sizeof(BackwardScratch));
static_assert(BACKWARD_SHARED <= 227 * 1024);

struct BackwardMaps {
  TensorMap own, other, planes;
};

struct BackwardBlock {
  const BackwardArguments& arguments;
  const BackwardMaps& maps;
  unsigned char* stages;
  BackwardScratch* scratch;
  BackwardSteps steps;
  BackwardUnits units;
  int rank;

  __device__ unsigned char* own_features(int stage) const {
    return stages + stage * BACKWARD_STAGE_BYTES;
  }
  __device__ unsigned char* other_features(int stage) const {
    return own_features(stage) + FEATURES_BYTES;
  }
  __device__ unsigned char* plane(int stage) const {
    return other_features(stage) + FEATURES_BYTES;
  }

  __device__ BackwardTile<BACKWARD_COLUMNS> tile(int unit, int stage) const {
    // Clusters with the same rows run at the same time, so that these are in the L2 cache.
    const int across = ceil_div(arguments.own_side().width, BACKWARD_COLUMNS);
    const int pair = units.pair(unit);
    int row = (pair / across * CLUSTER_SIZE + rank) * BACKWARD_ROWS;
    if (units.is_half(unit)) row += (unit - units.whole) % 2 * (BACKWARD_ROWS / 2);
    const int column = pair % across * BACKWARD_COLUMNS;
    return {arguments, scratch->terms, scratch->long_rows, own_features(stage), FEATURES_BYTES,
            row,       column};
  }

  // Calls a function for each unit of this cluster.
  template <typename Function>
  __device__ void for_each_unit(Function function) const {
    for (int unit = static_cast<int>(blockIdx.x) / CLUSTER_SIZE; unit < units.count;
         unit += units.clusters) {
      function(unit);
    }
  }

  // Warp 0, of which one thread copies.
  __device__ void fetch() const {
    PipelineState<BACKWARD_STAGES> state;
    for_each_unit([&](int unit) {
      const auto target = tile(unit, 0);
      for (int i = 0; i <= steps.count(); ++i, state.advance()) {
        Mbarrier* full = scratch->full + state.stage;
        wait_barrier(scratch->empty + state.stage, state.parity ^ 1);
        if (i == steps.count()) {
          constexpr int BOXES = BACKWARD_COLUMNS / BOX_COLUMNS;
          arrive_expect_tx(full, BOXES * FEATURES_BYTES);
#pragma unroll
          for (int box = 0; box < BOXES; ++box) {
            copy_box(own_features(state.stage) + box * FEATURES_BYTES, &maps.own,
                     target.column + box * BOX_COLUMNS, target.row, full);
          }
        } else {
          fetch_step(steps.at(i), target.row, target.column, state.stage);
        }
      }
    });
  }

  __device__ void fetch_step(const BackwardStep& step, int row, int column, int stage) const {
    Mbarrier* full = scratch->full + stage;
    const bool has_other = !step.is_own || arguments.equal_widths();
    arrive_expect_tx(full, PLANE_BYTES + (step.is_own + has_other) * FEATURES_BYTES);
    if (step.is_own) copy_box(own_features(stage), &maps.own, step.inner, row, full);
    if (has_other) copy_box(other_features(stage), &maps.other, step.inner, row, full);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int box = 2 * rank + k;
      copy_box_multicast(plane(stage) + box * BOX_BYTES, &maps.planes, column + box * BOX_COLUMNS,
                         step.plane_row(arguments.forward.width), full);
    }
  }

  // Warp 1: what W subtracts for the means.
  __device__ void compute_constants() const {
    const int lane = threadIdx.x % 32;
    const float c_own = arguments.scalar(W_OWN), c_other = arguments.w_other();
    PipelineState<BACKWARD_STAGES> state;
    for_each_unit([&](int) {
      for (int i = 0; i <= steps.count(); ++i, state.advance()) {
        wait_barrier(scratch->empty + state.stage, state.parity ^ 1);
        if (i < steps.own_count()) {
#pragma unroll
          for (int column = lane; column < BOX_COLUMNS; column += 32) {
            const int inner = steps.at(i).inner + column;
            scratch->constants[state.stage][column] =
                -(c_own * arguments.own_means()[inner] + c_other * arguments.other_means()[inner]);
          }
        }
        __syncwarp();
        if (lane == 0) arrive(scratch->full + state.stage);
      }
    });
  }

  // Warps 2 and 3: the terms of a tile's columns, and those of its rows.
  template <bool OF_ROWS>
  __device__ void compute_terms() const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    unsigned parity = 0;
    for_each_unit([&](int unit) {
      wait_barrier(&scratch->terms_empty, parity ^ 1);
      parity ^= 1;
      const auto target = tile(unit, 0);
      if (OF_ROWS) {
        target.compute_rows(lane, 32);
        target.compute_long_weights(lane, 32);
      } else {
        target.compute_columns(lane, 32);
        target.compute_long_columns(lane, 32);
      }
      __syncwarp();
      if (lane == 0) arrive(&scratch->terms_full);
    });
  }
};

// A consumer warpgroup.
struct BackwardConsumer {
  const BackwardBlock& block;
  int half;  // index of its 64 rows in the block
  float c_own, c_other;
  PipelineState<BACKWARD_STAGES> state = {};
  unsigned terms_parity = 0;

  // The first of this warp's 16 rows in the tile.
  __device__ int first_row() const { return half * 64 + threadIdx.x / 32 % 4 * 16; }

  // Forms the high or low halves of 16 rows and 64 columns of W, as operands of WGMMA.
  template <bool LOW>
  __device__ void form(uint32_t (&w)[BOX_COLUMNS / 16][4]) const {
    const int lane = threadIdx.x % 32, row = first_row() + lane % 16;
    const unsigned char* own = block.own_features(state.stage) + row * 128;
    // If the widths differ, c_other is 0.
    const unsigned char* other =
        own + (block.arguments.equal_widths() ? FEATURES_BYTES : 0);
    const float* constants = block.scratch->constants[state.stage] + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) {
      const int offset = ((2 * k + lane / 16) ^ row % 8) * 16;
      uint32_t x[4], y[4];
      load_matrices(x, own + offset);
      load_matrices(y, other + offset);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        w[k][part] = form_pair<LOW>(x[part], y[part], c_own, c_other,
                                    load_floats<2>(constants + 16 * k + part / 2 * 8));
      }
    }
  }

  // Starts the products of one step of W P. They read `w` until they are complete, which they are
  // one step later.
  template <bool LOW>
  __device__ void begin_own(float (&c)[128], uint32_t (&w)[BOX_COLUMNS / 16][4]) const {
    wait_barrier(block.scratch->full + state.stage, state.parity);
    form<LOW>(w);
    const uint64_t plane = matrix_descriptor(block.plane(state.stage), BOX_BYTES);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < BOX_COLUMNS / 16; ++k) multiply_add(c, w[k], plane + k * (16 * 128 / 16));
    warpgroup_commit();
  }

  // Starts the products of one step of Other R.
  __device__ void begin_other(float (&c)[128]) const {
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

  // Waits for the products of the step before.
  __device__ void end_previous(int& previous) {
    warpgroup_wait<1>();
    if (previous >= 0) release(previous);
    previous = state.stage;
    state.advance();
  }

  // The steps have separate loops by kind: where a branch lies between products, the compiler
  // inserts waits.
  template <bool LOW>
  __device__ void multiply_own(float (&c)[128], int count) {
    uint32_t even[BOX_COLUMNS / 16][4], odd[BOX_COLUMNS / 16][4];
    int previous = -1;
    for (int i = 0; i < count; i += 2) {
      begin_own<LOW>(c, even);
      end_previous(previous);
      if (i + 1 == count) break;
      begin_own<LOW>(c, odd);
      end_previous(previous);
    }
    warpgroup_wait<0>();
    if (previous >= 0) release(previous);
  }

  __device__ void multiply_other(float (&c)[128], int count) {
    int previous = -1;
    for (int i = 0; i < count; ++i) {
      begin_other(c);
      end_previous(previous);
    }
    warpgroup_wait<0>();
    release(previous);
  }

  __device__ void run() {
    const BackwardSteps& steps = block.steps;
    const int low_count = steps.own_passes == 3 ? steps.own_steps : 0;
    block.for_each_unit([&](int unit) {
      if (half == 1 && block.units.is_half(unit)) {
        skip();
        return;
      }
      float c[128] = {};
      multiply_own<false>(c, steps.own_count() - low_count);
      multiply_own<true>(c, low_count);
      multiply_other(c, steps.count() - steps.own_count());
      finish(c, unit);
    });
  }

  // Hands back what belongs to a unit in which this warpgroup has no rows.
  __device__ void skip() {
    for (int i = 0; i <= block.steps.count(); ++i) {
      wait_barrier(block.scratch->full + state.stage, state.parity);
      release(state.stage);
      state.advance();
    }
    wait_terms();
    release_terms();
  }

  __device__ void finish(float (&c)[128], int unit) {
    wait_terms();
    wait_barrier(block.scratch->full + state.stage, state.parity);
    const auto tile = block.tile(unit, state.stage);
    tile.template finish<1, BACKWARD_COLUMNS / 16>(c, first_row(), 0);
    release_terms();
    tile.store(first_row());
    // The copy engine writes to this stage next.
    fence_async_proxy();
    __syncwarp();
    release(state.stage);
    state.advance();
  }

  __device__ void wait_terms() {
    wait_barrier(&block.scratch->terms_full, terms_parity);
    terms_parity ^= 1;
  }

  // Also makes the gradient in shared memory visible to the warp.
  __device__ void release_terms() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(&block.scratch->terms_empty);
  }

  __device__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    if (lane < CLUSTER_SIZE) arrive_remote(block.scratch->empty + stage, lane);
  }
};

__device__ inline void run_backward(const BackwardArguments& arguments, const BackwardMaps& maps) {
  unsigned char* memory = shared_memory();
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  auto* scratch =
      reinterpret_cast<BackwardScratch*>(memory + BACKWARD_STAGES * BACKWARD_STAGE_BYTES);
  const int rank = static_cast<int>(blockIdx.x) % CLUSTER_SIZE;
  const BackwardBlock block{
      arguments, maps, memory, scratch, backward_steps(arguments, BOX_COLUMNS),
      backward_units(arguments.forward, arguments.side), rank};
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.own);
    prefetch_tensor_map(&maps.other);
    prefetch_tensor_map(&maps.planes);
    for (int stage = 0; stage < BACKWARD_STAGES; ++stage) {
      // The thread that copies, and warp 1.
      init_barrier(scratch->full + stage, 2);
      // One thread of each consumer warp arrives, in both blocks.
      init_barrier(scratch->empty + stage, CLUSTER_SIZE * CONSUMER_WARPS);
    }
    init_barrier(&scratch->terms_full, 2);
    init_barrier(&scratch->terms_empty, CONSUMER_WARPS);
    fence_barrier_init();
  }
  __syncwarp();
  cluster_barrier();
  if (warp >= 4) {
    allocate_registers();
    const int half = uniform(warp / 4 - 1);
    BackwardConsumer{block, half, arguments.scalar(W_OWN), arguments.w_other()}.run();
  } else {
    deallocate_registers();
    if (threadIdx.x == 0) block.fetch();
    if (warp == 1) block.compute_constants();
    if (warp == 2) block.compute_terms<false>();
    if (warp == 3) block.compute_terms<true>();
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
