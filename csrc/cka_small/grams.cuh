// Both Gram matrices in the registers of a block of cka_small: normalized, summed, and combined
// into the matrices of the gradients.
#pragma once

#include "cka_small/group.cuh"
#include "cka_small/head.h"
#include "cka_small/row_set.cuh"

namespace rift {

// Sums over the rows of one side: of the rows' sums and of the diagonal; and its largest element.
struct alignas(16) SideTotals {
  float rows, trace, peak;
};

// Inner products of both matrices.
struct Products {
  double xx, yy, xy;
};

template <int ROWS>
struct GramTiles {
  static constexpr int ROW_TILES = ROWS / TILE_ROWS, TILES = tile_count(ROW_TILES);
  // Tiles of a warp: every eighth one. Its lanes have the elements that they computed.
  static constexpr int SHARE = (TILES + CKA_SMALL_WARPS - 1) / CKA_SMALL_WARPS;
  // Threads that sum the rows of one side, in whole warps.
  static constexpr int SIDE_THREADS = ROWS < 32 ? 32 : ROWS, SIDE_WARPS = SIDE_THREADS / 32;

  float k[SHARE][2][8];  // [tile][side][element]

  __device__ static int tile_of(int i) { return threadIdx.x / 32 + i * CKA_SMALL_WARPS; }

  template <typename Group>
  __device__ void load(const Group& group) {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      if (tile_of(i) < TILES) {
        group.receive(tile_of(i), k[i][0]);
        group.receive(TILES + tile_of(i), k[i][1]);
      }
    }
  }

  // Adds up the rows of both matrices, which the owners of the tiles have passed on, into
  // offsets[side][row], and their totals, traces and peaks into scratch, for totals().
  __device__ static void sum_rows(const float* row_sums, const float* diagonal, float* offsets,
                                  float* scratch) {
    const int side = threadIdx.x / SIDE_THREADS, row = threadIdx.x % SIDE_THREADS;
    if (side > 1) return;
    float sum = 0, energy = 0;
    if (row < ROWS) {
#pragma unroll
      for (int j = 0; j < ROW_TILES; ++j) sum += row_sums[(side * ROW_TILES + j) * ROWS + row];
      energy = diagonal[side * ROWS + row];
      offsets[side * ROWS + row] = sum;
    }
    const float total = warp_sum(sum), trace = warp_sum(energy);
    float peak = energy;
    for (int lane = 16; lane > 0; lane /= 2) {
      peak = max(peak, __shfl_xor_sync(0xffffffffu, peak, lane));
    }
    if (threadIdx.x % 32 == 0) {
      reinterpret_cast<SideTotals*>(scratch)[threadIdx.x / 32] = {total, trace, peak};
    }
  }

  // Of one side, from what sum_rows left in scratch.
  __device__ static SideTotals totals(const float* scratch, int side) {
    const auto* parts = reinterpret_cast<const SideTotals*>(scratch) + side * SIDE_WARPS;
    SideTotals sum = parts[0];
#pragma unroll
    for (int i = 1; i < SIDE_WARPS; ++i) {
      sum.rows += parts[i].rows;
      sum.trace += parts[i].trace;
      sum.peak = max(sum.peak, parts[i].peak);
    }
    return sum;
  }

  // Scales both matrices to those of features of unit norm, and U-centers them if debiased. Sums
  // <Kx, Kx>, <Ky, Ky> and <Kx, Ky>.
  __device__ void normalize(const RowSet<ROWS>& valid, bool debiased,
                            const UCentering (&centering)[2], const float* offsets, float* scratch,
                            CkaSums& sums) {
    float products[3] = {};
    const int g = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      if (tile_of(i) >= TILES) break;
      const TileCoord tile = gram_tile_coord<ROWS>(tile_of(i));
      const uint32_t rows = valid.of_tile(tile.i) >> g, columns = valid.of_tile(tile.j) >> column;
      bool included[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int down = e / 2 % 2 * 8, right = e / 4 * 8 + e % 2;
        const bool on_diagonal = tile.i == tile.j && g + down == column + right;
        included[e] = (rows >> down & columns >> right & 1) && !(debiased && on_diagonal);
      }
      float own[3] = {};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float* row = offsets + side * ROWS + tile.i * TILE_ROWS + g;
        const float* first = offsets + side * ROWS + tile.j * TILE_ROWS + column;
        const float row_offsets[2] = {centering[side].offset(row[0]),
                                      centering[side].offset(row[8])};
        const float column_offsets[4] = {
            centering[side].offset(first[0]), centering[side].offset(first[1]),
            centering[side].offset(first[8]), centering[side].offset(first[9])};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float centered = k[i][side][e] * centering[side].scale -
                                 (row_offsets[e / 2 % 2] + column_offsets[e / 4 * 2 + e % 2]);
          k[i][side][e] = included[e] ? centered : 0;
          own[side] += k[i][side][e] * k[i][side][e];
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) own[2] += k[i][0][e] * k[i][1][e];
      // A tile above the diagonal stands for its mirror image as well.
      const float weight = tile.i == tile.j ? 1 : 2;
#pragma unroll
      for (int p = 0; p < 3; ++p) products[p] += weight * own[p];
    }
    sum_products(products, scratch, sums);
  }

  // Stores own K_own + other K_other as two bfloat16 for each element: the high and then the low
  // halves of a tile as four 8 x 8 matrices each.
  __device__ void store_matrix(uint16_t* matrix, int side, float own, float other) const {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
      if (tile_of(i) >= TILES) break;
      auto* high = reinterpret_cast<uint32_t*>(matrix + 2 * TILE_FLOATS * tile_of(i));
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        uint32_t high_pair, low_pair;
        const int e = 2 * part;
        split_pair(own * k[i][side][e] + other * k[i][1 - side][e],
                   own * k[i][side][e + 1] + other * k[i][1 - side][e + 1], high_pair, low_pair);
        high[part * 32 + threadIdx.x % 32] = high_pair;
        high[TILE_FLOATS / 2 + part * 32 + threadIdx.x % 32] = low_pair;
      }
    }
  }

 private:
  // Sums the threads' parts over the block. In scratch, after what totals() reads.
  __device__ static void sum_products(const float (&products)[3], float* scratch, CkaSums& sums) {
    auto* parts = reinterpret_cast<Products*>(scratch + CKA_SMALL_WARPS * 4);
    const Products own{warp_sum(products[0]), warp_sum(products[1]), warp_sum(products[2])};
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
    __syncthreads();
    // Two chains of additions take half as long as one. Loads of all parts at once would take more
    // registers than there are.
    Products sum[2] = {parts[0], parts[1]};
#pragma unroll 1
    for (int warp = 2; warp < CKA_SMALL_WARPS; warp += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i].xx += parts[warp + i].xx;
        sum[i].yy += parts[warp + i].yy;
        sum[i].xy += parts[warp + i].xy;
      }
    }
    sums.xx = sum[0].xx + sum[1].xx;
    sums.yy = sum[0].yy + sum[1].yy;
    sums.xy = sum[0].xy + sum[1].xy;
  }
};

}  // namespace rift
