// One side's gradient of linear CKA in covariance form by mma.sync, for any GPU from sm_80 on; see
// backward.cuh.
//
// A block owns 128 x 128 elements of the gradient and sums both products in one accumulator. All
// its threads prefetch steps of 32 by cp.async into a circular buffer of stages. One step ahead,
// they replace own features by W, which all warps multiply. The features of the tile itself come
// after the last step, and the gradient takes their place before it is written.
//
// Memory traffic for each tile: own and other features once for W, other features once more; P and
// R once, or also their low halves; the tile's features once.
#pragma once

#include "cka_large/backward_tile.cuh"
#include "cka_large/tiles_sm80.cuh"

namespace rift {

constexpr int BACKWARD_RING_STEP = 32;
constexpr int BACKWARD_RING_STAGES = 4;
constexpr int BACKWARD_RING_OPERAND = TILE * BACKWARD_RING_STEP * 2;
constexpr int BACKWARD_RING_STAGE = 3 * BACKWARD_RING_OPERAND;
static_assert(TILE == BACKWARD_ROWS);
static_assert(TILE * BOX_COLUMNS * 2 <= BACKWARD_RING_STAGE);
static_assert(sizeof(BackwardLongRows<TILE>) <= BACKWARD_RING_STAGE);
// The stages and the terms after them fit the 99 KiB of sm_86 and sm_89.
constexpr int BACKWARD_RING_SHARED =
    BACKWARD_RING_STAGES * BACKWARD_RING_STAGE + static_cast<int>(sizeof(BackwardTerms<TILE>));
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

  __device__ unsigned char* stage(int step) const {
    return memory + step % BACKWARD_RING_STAGES * BACKWARD_RING_STAGE;
  }
  __device__ unsigned char* other_features(int step) const {
    return stage(step) + BACKWARD_RING_OPERAND;
  }
  __device__ unsigned char* plane(int step) const {
    return other_features(step) + BACKWARD_RING_OPERAND;
  }

  // The tile's features are two steps after the last, and the long rows are in the next stage.
  __device__ BackwardTile<TILE> tile() const {
    const int count = steps.count();
    auto& terms = *reinterpret_cast<BackwardTerms<TILE>*>(
        memory + BACKWARD_RING_STAGES * BACKWARD_RING_STAGE);
    auto& long_rows = *reinterpret_cast<BackwardLongRows<TILE>*>(stage(count + 2));
    const auto next = static_cast<int>(stage(count + 1) - stage(count));
    return {arguments, terms, long_rows, stage(count), next, row, column};
  }

  // Starts to fetch a step, if there is one, as a group.
  __device__ void fetch(int i) const {
    const int beyond = i - steps.count();
    if (beyond < 0) {
      constexpr int STEP = BACKWARD_RING_STEP;
      const BackwardStep step = steps.at(i);
      if (step.is_own) fetch_tile<TILE, STEP>(stage(i), matrices.own, row, step.inner);
      if (!step.is_own || arguments.equal_widths()) {
        fetch_tile<TILE, STEP>(other_features(i), matrices.other, row, step.inner);
      }
      fetch_tile<STEP, TILE>(plane(i), matrices.planes, step.plane_row(arguments.forward.width),
                             column);
    } else if (beyond < TILE / BOX_COLUMNS) {
      fetch_tile<TILE, BOX_COLUMNS>(stage(i), matrices.own, row, column + beyond * BOX_COLUMNS);
    }
    commit_copies();
  }

  // Replaces own features by the high or low halves of W.
  __device__ void form(int i) const {
    const BackwardStep step = steps.at(i);
    if (step.is_own && step.pass < 2) form<false>(i, step.inner);
    if (step.is_own && step.pass == 2) form<true>(i, step.inner);
  }

  template <bool LOW>
  __device__ void form(int i, int first_inner) const {
    using Layout = TileLayout<BACKWARD_RING_STEP>;
    using Pairs = Vector<uint32_t, VECTOR / 2>;
    const float c_own = arguments.scalar(W_OWN), c_other = arguments.w_other();
    const int vector = threadIdx.x % Layout::VECTORS;
    const int inner = first_inner + vector * VECTOR;
    float constants[VECTOR];
#pragma unroll
    for (int k = 0; k < VECTOR; k += 4) {
      const auto own_means = load_floats<4>(arguments.own_means() + inner + k);
      const auto other_means = load_floats<4>(arguments.other_means() + inner + k);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        constants[k + n] = -(c_own * own_means.elements[n] + c_other * other_means.elements[n]);
      }
    }
    // If the widths differ, c_other is 0.
    const int other_offset = arguments.equal_widths() ? BACKWARD_RING_OPERAND : 0;
#pragma unroll
    for (int tile_row = threadIdx.x / Layout::VECTORS; tile_row < TILE;
         tile_row += TILE_THREADS / Layout::VECTORS) {
      unsigned char* own = stage(i) + Layout::offset(tile_row, vector);
      const Pairs x = *reinterpret_cast<const Pairs*>(own);
      const Pairs y = *reinterpret_cast<const Pairs*>(own + other_offset);
      Pairs w;
#pragma unroll
      for (int k = 0; k < VECTOR / 2; ++k) {
        w.elements[k] = form_pair<LOW>(x.elements[k], y.elements[k], c_own, c_other,
                                       {constants[2 * k], constants[2 * k + 1]});
      }
      *reinterpret_cast<Pairs*>(own) = w;
    }
  }

  __device__ void multiply(float (&c)[4][4][4], int i) const {
    const unsigned char* left = steps.at(i).is_own ? stage(i) : other_features(i);
#pragma unroll
    for (int inner = 0; inner < BACKWARD_RING_STEP; inner += 16) {
      Fragments fragments;
      load_right(fragments, plane(i), inner);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        load_inner_columns<BACKWARD_RING_STEP>(fragments.a[k], left, warp_row() + 16 * k, inner);
      }
      multiply_add(c, fragments);
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
  const BackwardTile<TILE> tile = ring.tile();
  tile.compute_columns(threadIdx.x, TILE_THREADS);
  tile.compute_rows(threadIdx.x, TILE_THREADS);
  wait_copies<AHEAD - 1>();
  __syncthreads();
  ring.form(0);
  float c[4][4][4] = {};
  for (int i = 0; i < steps.count(); ++i) {
    // After this, W of this step and the features of the next are in shared memory, and no thread
    // uses the previous step, so that its stage is free.
    wait_copies<AHEAD - 2>();
    __syncthreads();
    ring.fetch(i + AHEAD);
    ring.form(i + 1);
    ring.multiply(c, i);
  }
  wait_copies<0>();
  __syncthreads();
  if (arguments.long_row(0) >= 0) {
    tile.compute_long_columns(threadIdx.x, TILE_THREADS);
    tile.compute_long_weights(threadIdx.x, TILE_THREADS);
    __syncthreads();
  }
  tile.finish<4, 2>(&c[0][0][0], warp_row(), warp_column());
  __syncthreads();
  tile.store(threadIdx.x / 32 * 16);
}

}  // namespace rift
