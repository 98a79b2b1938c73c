// Linear CKA of up to 128 rows: value and gradients in one launch.
//
//   value  = <Kx, Ky> / (||Kx|| ||Ky||),  K = Xc Xc^T of each side, U-centered if debiased
//   grad_X = (own_x Kx + other Ky) Xc,    see head.h
//
// A group of blocks owns a layer, and each block owns some columns of all its rows. A block:
//   1. copies its columns to shared memory, all at once, centers them in float32, and stores them
//      as two bfloat16 each
//   2. computes what they add to Kx and Ky: upper tiles only, three products of halves
//   3. passes each tile to its owner, who sums it over all blocks, in their order; takes all sums
//      from their owners into registers: every block then has the same Kx and Ky to the last bit
//   4. computes norms, value and coefficients, as every other block does, and own_x Kx + other Ky
//   5. computes its columns of the gradients
// The group is a cluster, which exchanges data through distributed shared memory. Before sm_90, its
// blocks are launched cooperatively and exchange data through global memory.
//
// Memory traffic: features and gradients once; between blocks, Kx and Ky twice.
#pragma once

#include "cka_small/features.cuh"
#include "cka_small/grams.cuh"
#include "cka_small/group.cuh"
#include "cka_small/head.h"
#include "cka_small/layout.h"
#include "cka_small/row_set.cuh"

namespace rift {

// Whether this architecture runs the kernels with, or without, clusters; the others stay empty.
template <bool CLUSTER>
__device__ constexpr bool matches_architecture() {
#ifdef __CUDA_ARCH__
  return CLUSTER == (__CUDA_ARCH__ >= 900);
#else
  return true;
#endif
}

// One block's share of one entry.
template <typename T, typename G, int ROWS, bool CLUSTER>
__device__ void run_cka_small(const CkaSmallArguments& arguments) {
  constexpr int ROW_TILES = ROWS / TILE_ROWS, TILES = tile_count(ROW_TILES);
  constexpr int WARPS = CKA_SMALL_WARPS;
  const int entry = blockIdx.y, blocks = gridDim.x, rank = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const CkaSmallLayer& layer = arguments.layers[arguments.batched ? 0 : entry];
  const long long batch = arguments.batched ? entry : 0;
  const int log2_blocks = __popc(gridDim.x - 1);
  const CkaSmallLayout layout =
      cka_small_layout(ROWS, arguments.block_columns, log2_blocks, CLUSTER);
  unsigned char* memory = shared_memory();
  auto* exchanged = reinterpret_cast<float*>(memory + layout.exchange);
  auto* scratch = reinterpret_cast<float*>(memory + layout.scratch);
  const int units = arguments.block_columns / TILE_ROWS;
  const auto features = [&](int side) {
    return Features<ROWS>{memory + side * layout.side, units};
  };

  BlockGroup<ROWS, CLUSTER> group{};
  group.rank = rank;
  group.blocks = blocks;
  group.log2_blocks = log2_blocks;
  group.local = exchanged;
  if (!CLUSTER) {
    group.workspace =
        arguments.workspace + static_cast<long long>(entry) * blocks * group.layout().floats;
    group.local = group.exchange(rank);
    group.counter = arguments.counters + counter_at(entry, log2_blocks);
  }
  group.begin();

  // The block requests all that it reads from global memory before it waits for any of it.
  const int begin = rank * arguments.block_columns;
  for (int i = warp; i < 2 * units; i += WARPS) {
    const int is_y = i >= units, column = begin + (i - is_y * units) * TILE_ROWS;
    const CkaSmallSide& side = layer.sides[is_y];
    features(is_y).unit(i - is_y * units).copy(
        static_cast<const T*>(side.features) + batch * arguments.batch_features[is_y] +
            column * side.stride_d,
        side.stride_n, side.stride_d, layer.rows, side.width - column);
  }
  commit_copies();
  unsigned char mask[(ROWS + 31) / 32];
#pragma unroll
  for (int i = 0; i < (ROWS + 31) / 32; ++i) {
    const int row = lane + 32 * i;
    mask[i] = row < layer.rows;
    if (layer.mask && row < layer.rows) mask[i] = layer.mask[batch * arguments.batch_mask + row];
  }
  const RowSet<ROWS> valid(mask);
  const int count = valid.count();
  const float inverse_count = 1 / static_cast<float>(count);
  const UCenteringFactors factors(count, arguments.debiased);
  wait_copies<0>();
  __syncwarp();
  for (int i = warp; i < 2 * units; i += WARPS) {
    features(0).unit(i).template center<T>(valid, inverse_count, scratch + warp * TILE_ROWS);
  }
  __syncthreads();

  // Rows of tiles, from the longest of Kx to the longest of Ky: the warps that share a quarter of
  // the processor, or each warp, then have as many tiles as the others.
  group.wait_until_all_begin();
  for (int unit = warp; unit < 2 * ROW_TILES; unit += WARPS) {
    const int is_y = unit >= ROW_TILES;
    features(is_y).gram_row(is_y ? 2 * ROW_TILES - 1 - unit : unit,
                          [&](TileCoord tile, const float(&c)[2][4]) {
                            group.send(is_y * TILES + tile_index(tile.i, tile.j), c);
                          });
  }
  group.barrier();
  group.sum_tiles();
  group.barrier();

  GramTiles<ROWS> grams;
  grams.load(group);
  // What was exchanged there has been summed.
  float* offsets = exchanged;
  GramTiles<ROWS>::sum_rows(group.local + group.layout().row_sums,
                            group.local + group.layout().diagonal, offsets, scratch);
  __syncthreads();
  CkaSums sums{};
  const SideTotals x = GramTiles<ROWS>::totals(scratch, 0), y = GramTiles<ROWS>::totals(scratch, 1);
  const float inverse_x = x.trace == 0 ? 1 : rsqrtf(x.trace);
  const float inverse_y = y.trace == 0 ? 1 : rsqrtf(y.trace);
  const UCentering centering[2] = {factors.centering(inverse_x * inverse_x, x.rows),
                                   factors.centering(inverse_y * inverse_y, y.rows)};
  sums.trace_x = x.trace;
  sums.trace_y = y.trace;
  sums.peak_x = x.peak * centering[0].scale;
  sums.peak_y = y.peak * centering[1].scale;
  grams.normalize(valid, arguments.debiased, centering, offsets, scratch, sums);
  // All warps have received their tiles.
  group.end();
  const CkaResult result = cka_head(sums, count, arguments.debiased, arguments.distance);
  if (rank == 0 && threadIdx.x == 0) arguments.values[entry] = result.value;

  auto* matrices = reinterpret_cast<uint16_t*>(exchanged);
  constexpr int MATRIX = 2 * TILES * TILE_FLOATS;
  if (layer.sides[0].grad) grams.store_matrix(matrices, 0, result.own_x, result.other);
  if (layer.sides[1].grad) grams.store_matrix(matrices + MATRIX, 1, result.own_y, result.other);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const CkaSmallSide& side = layer.sides[i];
    if (!side.grad) continue;
    G* grad = static_cast<G*>(side.grad) + batch * arguments.batch_grads[i] + begin;
    features(i).gradient(matrices + i * MATRIX, i ? inverse_y : inverse_x, valid, grad, layer.rows,
                       side.width - begin, side.width);
  }
  group.wait_until_all_end();
}

// T: type of features; G: of gradients. blockIdx.y is the index of the entry.
template <typename T, typename G, int ROWS, bool CLUSTER>
__global__ void __launch_bounds__(CKA_SMALL_THREADS, ROWS == 16 ? 3 : ROWS < 128 ? 2 : 1)
    cka_small_kernel(const __grid_constant__ CkaSmallArguments arguments) {
  if constexpr (matches_architecture<CLUSTER>()) run_cka_small<T, G, ROWS, CLUSTER>(arguments);
}

}  // namespace rift
