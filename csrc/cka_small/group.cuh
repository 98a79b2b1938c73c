// The blocks of a layer: their barriers, and what they exchange.
#pragma once

#include "cka_small/layout.h"
#include "common/elements.cuh"
#include "common/reduce.cuh"

namespace rift {

using Quad = Vector<float, 4>;

// tile_coord, without a loop.
template <int ROWS>
__device__ TileCoord gram_tile_coord(int index) {
  int j = 0;
#pragma unroll
  for (int k = 1; k < ROWS / TILE_ROWS; ++k) j += index >= tile_index(0, k);
  return {index - tile_index(0, j), j};
}

template <int ROWS, bool CLUSTER>
struct BlockGroup {
  float* local;       // what this block lets the others read and write; see ExchangeLayout
  float* workspace;   // the same of all blocks; null in a cluster
  unsigned* counter;  // of arrivals at the barrier; null in a cluster
  int rank, blocks, log2_blocks;

  // Not a member: its offsets would occupy registers all the time.
  __device__ ExchangeLayout layout() const { return exchange_layout(ROWS, log2_blocks); }

  __device__ float* exchange(int block) const {
    return CLUSTER ? const_cast<float*>(map_to_rank(local, block))
                   : workspace + static_cast<long long>(block) * layout().floats;
  }

  // All blocks of the group must have begun before others access their shared memory.
  __device__ void begin() const {
    if (CLUSTER) cluster_arrive();
  }
  __device__ void wait_until_all_begin() const {
    if (CLUSTER) cluster_wait();
  }

  // A block must not exit while another may still read its shared memory.
  __device__ void end() const {
    if (CLUSTER) cluster_arrive();
  }
  __device__ void wait_until_all_end() const {
    if (CLUSTER) cluster_wait();
  }

  __device__ void barrier() const {
    if (CLUSTER) {
      cluster_barrier();
      return;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      // The counter is never reset, because every barrier adds the number of blocks.
      const unsigned count = static_cast<unsigned>(blocks);
      const unsigned goal = atomicAdd(counter, 1u) / count * count + count;
      while (static_cast<int>(load_acquire(counter) - goal) < 0) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  // Passes this block's part of a tile to the tile's owner.
  __device__ void send(int tile, const float (&c)[2][4]) const {
    float* slot = exchange(tile & (blocks - 1)) +
                  ((tile >> log2_blocks) * blocks + rank) * TILE_FLOATS + threadIdx.x % 32 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<Quad*>(slot + half * TILE_FLOATS / 2) = {c[half][0], c[half][1],
                                                                 c[half][2], c[half][3]};
    }
  }

  // Sums the tiles that this block owns over all blocks, in their order. Passes the sums of their
  // rows, and the diagonal, to all blocks.
  __device__ void sum_tiles() const {
    for (int own = threadIdx.x / 32; own < layout().owned; own += CKA_SMALL_WARPS) {
      const int tile = own * blocks + rank;
      if (tile < gram_tiles(ROWS)) sum_tile(tile, own);
    }
  }

  // Loads this lane's elements of a tile, once its owner has summed it.
  __device__ void receive(int tile, float (&k)[8]) const {
    const float* sum = exchange(tile & (blocks - 1)) + layout().sums +
                       (tile >> log2_blocks) * TILE_FLOATS + threadIdx.x % 32 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Quad quad = *reinterpret_cast<const Quad*>(sum + half * TILE_FLOATS / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) k[4 * half + i] = quad.elements[i];
    }
  }

 private:
  __device__ void sum_tile(int tile, int own) const {
    constexpr int LOADS = 4;  // in flight, of either half
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float k[8] = {};
    const float* slot = local + own * blocks * TILE_FLOATS + 4 * lane;
    for (int block = 0; block < blocks; block += LOADS) {
      Quad parts[LOADS][2];
#pragma unroll
      for (int i = 0; i < 2 * LOADS; ++i) {
        if (block + i / 2 < blocks) {
          parts[i / 2][i % 2] = *reinterpret_cast<const Quad*>(
              slot + (block + i / 2) * TILE_FLOATS + i % 2 * (TILE_FLOATS / 2));
        }
      }
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        if (block + i < blocks) {
#pragma unroll
          for (int j = 0; j < 8; ++j) k[j] += parts[i][j / 4].elements[j % 4];
        }
      }
    }
    float* sum = local + layout().sums + own * TILE_FLOATS + 4 * lane;
    *reinterpret_cast<Quad*>(sum) = {k[0], k[1], k[2], k[3]};
    *reinterpret_cast<Quad*>(sum + TILE_FLOATS / 2) = {k[4], k[5], k[6], k[7]};

    constexpr int TILES = tile_count(ROWS / TILE_ROWS);
    const int side = tile >= TILES;
    const TileCoord coord = gram_tile_coord<ROWS>(tile - side * TILES);
    const bool is_diagonal = coord.i == coord.j, has_diagonal = is_diagonal && g / 2 == t;
    float diagonal[2] = {};
    if (has_diagonal) {
      diagonal[0] = g % 2 ? k[1] : k[0];
      diagonal[1] = g % 2 ? k[7] : k[6];
      k[0] = g % 2 ? k[0] : 0;
      k[1] = g % 2 ? 0 : k[1];
      k[6] = g % 2 ? k[6] : 0;
      k[7] = g % 2 ? 0 : k[7];
    }
    float rows[2] = {k[0] + k[1] + (k[4] + k[5]), k[2] + k[3] + (k[6] + k[7])};
    float columns[4] = {k[0] + k[2], k[1] + k[3], k[4] + k[6], k[5] + k[7]};
    const float row_sum = scatter_sum<1, 2>(rows), column_sum = scatter_sum<4, 16>(columns);
    const float diagonal_element = scatter_sum<1, 2>(diagonal);
    // Row g or, if bit 1 of the lane is set, g + 8. Two lanes have each sum; they share out the
    // blocks.
    const int own_row = g + lane / 2 % 2 * 8, own_column = lane / 16 * 8 + 2 * t + lane / 8 % 2;
    const int row_sums = layout().row_sums + side * (ROWS / TILE_ROWS) * ROWS;
    const int own_rows = row_sums + coord.j * ROWS + coord.i * TILE_ROWS + own_row;
    const int own_columns = row_sums + coord.i * ROWS + coord.j * TILE_ROWS + own_column;
    const int on_diagonal = layout().diagonal + side * ROWS + coord.i * TILE_ROWS + own_row;
    for (int block = 0; block < blocks; block += 2) {
      float* target = exchange((block + lane % 2) & (blocks - 1));
      target[own_rows] = row_sum;
      if (is_diagonal) {
        target[on_diagonal] = diagonal_element;
      } else {
        exchange((block + lane / 4 % 2) & (blocks - 1))[own_columns] = column_sum;
      }
    }
  }
};

}  // namespace rift
