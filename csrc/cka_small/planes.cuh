// What one block of cka_small has of one side: some columns of all rows, in shared memory.
#pragma once

#include "common/elements.cuh"
#include "common/reduce.cuh"
#include "common/triangle.h"

namespace rift {

// One side's columns of one block in shared memory: high and low halves, (ROWS, block_columns) each.
template <int ROWS>
struct Planes {
  uint16_t *high, *low;
  int pitch, block_columns;

  // The features as they are, all 32 bits of them; 0 for what is masked or outside.
  template <typename T>
  __device__ void load(const T* features, long long stride_n, long long stride_d,
                       const unsigned char* valid, int width) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
    if (stride_d == 1 && stride_n % SIZE == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0) {
      load_vectors<T, SIZE>(features, stride_n, stride_d, valid, width);
    } else {
      load_vectors<T, 1>(features, stride_n, stride_d, valid, width);
    }
  }

  template <typename T, int SIZE>
  __device__ void load_vectors(const T* features, long long stride_n, long long stride_d,
                               const unsigned char* valid, int width) const {
    // So many are under way at once.
    constexpr int BATCH = 4;
    const int threads = blockDim.x, row_steps = block_columns / SIZE, steps = ROWS * row_steps;
    for (int first = threadIdx.x; first < steps; first += threads * BATCH) {
      Vector<T, SIZE> from[BATCH] = {};
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int step = first + i * threads, row = step / row_steps;
        const int column = step % row_steps * SIZE;
        if (step >= steps || !valid[row]) continue;
        const T* at = features + row * stride_n + column * stride_d;
        if (column + SIZE <= width) {
          from[i] = *reinterpret_cast<const Vector<T, SIZE>*>(at);
        } else {
          for (int k = 0; k < SIZE; ++k) {
            if (column + k < width) from[i].elements[k] = at[k];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int step = first + i * threads,
                  at = step / row_steps * pitch + step % row_steps * SIZE;
        if (step >= steps) continue;
        Vector<uint16_t, SIZE> high_bits, low_bits;
#pragma unroll
        for (int k = 0; k < SIZE; ++k) {
          const uint32_t bits = float_to_bits(to_float(from[i].elements[k]));
          high_bits.elements[k] = static_cast<uint16_t>(bits >> 16);
          low_bits.elements[k] = static_cast<uint16_t>(bits);
        }
        *reinterpret_cast<Vector<uint16_t, SIZE>*>(high + at) = high_bits;
        *reinterpret_cast<Vector<uint16_t, SIZE>*>(low + at) = low_bits;
      }
    }
  }

  // Takes the mean off every column, exactly all of a constant one, and leaves it in two halves.
  // Returns this thread's part of the columns' energy about their first valid row.
  //
  // Half a warp owns two columns at a time, each lane every 16th row of them, in registers.
  __device__ float center(const unsigned char* valid, int first, int count) const {
    constexpr int LANES = 16, STEPS = ROWS / LANES;
    const int lane = threadIdx.x % LANES;
    float varies = 0;
    for (int column = threadIdx.x / LANES * 2; column < block_columns;
         column += blockDim.x / LANES * 2) {
      float pivot[2] = {}, x[STEPS][2], mean[2] = {};
      if (first < ROWS) read_pair(first * pitch + column, pivot);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        read_pair((lane + i * LANES) * pitch + column, x[i]);
        const bool counts = valid[lane + i * LANES];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          x[i][k] = counts ? x[i][k] - pivot[k] : 0;
          varies += x[i][k] * x[i][k];
        }
      }
      // The second time of what rounding has left of the mean.
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < STEPS; ++i) {
            sum += valid[lane + i * LANES] ? x[i][k] - mean[k] : 0;
          }
          mean[k] += warp_sum(sum, LANES) / static_cast<float>(count);
        }
      }
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        const bool counts = valid[lane + i * LANES];
        uint32_t high_pair, low_pair;
        split_pair(counts ? x[i][0] - mean[0] : 0, counts ? x[i][1] - mean[1] : 0, high_pair,
                   low_pair);
        const int at = (lane + i * LANES) * pitch + column;
        *reinterpret_cast<uint32_t*>(high + at) = high_pair;
        *reinterpret_cast<uint32_t*>(low + at) = low_pair;
      }
    }
    return varies;
  }

  // Two neighbours of a row, as load has left them.
  __device__ void read_pair(int at, float (&x)[2]) const {
    const uint32_t high_pair = *reinterpret_cast<const uint32_t*>(high + at);
    const uint32_t low_pair = *reinterpret_cast<const uint32_t*>(low + at);
    x[0] = bits_to_float(high_pair << 16 | (low_pair & 0xFFFF));
    x[1] = bits_to_float((high_pair & 0xFFFF0000) | low_pair >> 16);
  }

  // Where this lane's row of a 16 x 16 tile begins, for load_matrices.
  __device__ int lane_row(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return (row + lane % 16) * pitch + column + lane / 16 * 8;
  }

  // A tile of X X^T over this block's columns.
  __device__ void gram_tile(TileCoord pair, float* out) const {
    float c[2][4] = {};
    for (int k = 0; k < block_columns; k += TILE_ROWS) {
      uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
      load_matrices(a_high, high + lane_row(pair.i * TILE_ROWS, k));
      load_matrices(a_low, low + lane_row(pair.i * TILE_ROWS, k));
      load_matrices(b_high, high + lane_row(pair.j * TILE_ROWS, k));
      load_matrices(b_low, low + lane_row(pair.j * TILE_ROWS, k));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_add(c[half], a_low, b_high[half], b_high[half + 2]);
        multiply_add(c[half], a_high, b_low[half], b_low[half + 2]);
        multiply_add(c[half], a_high, b_high[half], b_high[half + 2]);
      }
    }
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[(row + i / 2 * 8) * TILE_PITCH + half * 8 + column + i % 2] = c[half][i];
      }
    }
  }

  // This block's columns of (own K + other K') X.
  template <typename G>
  __device__ void gradient(const float* k_own, const float* k_other, float own, float other,
                           float inverse, const unsigned char* valid, G* grad, int rows, int width,
                           int full_width) const {
    constexpr int TILES = ROWS / TILE_ROWS;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    // Rows of tiles over the warps, and columns where warps are left.
    const int across = max(1, warps / TILES);
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = warp / across; i < TILES; i += warps / across) {
      uint32_t m_high[TILES][4], m_low[TILES][4];
#pragma unroll
      for (int k = 0; k < TILES; ++k) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int m_row = i * TILE_ROWS + row + part % 2 * 8;
          const int m_column = k * TILE_ROWS + column + part / 2 * 8;
          const int first = element_offset(m_row, m_column),
                    second = element_offset(m_row, m_column + 1);
          split_pair(own * k_own[first] + other * k_other[first],
                     own * k_own[second] + other * k_other[second], m_high[k][part],
                     m_low[k][part]);
        }
      }
      for (int j = warp % across * TILE_ROWS; j < block_columns; j += across * TILE_ROWS) {
        float c[2][4] = {};
#pragma unroll
        for (int k = 0; k < TILES; ++k) {
          uint32_t x_high[4], x_low[4];
          load_matrices_transposed(x_high, high + lane_row(k * TILE_ROWS, j));
          load_matrices_transposed(x_low, low + lane_row(k * TILE_ROWS, j));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply_add(c[half], m_low[k], x_high[2 * half], x_high[2 * half + 1]);
            multiply_add(c[half], m_high[k], x_low[2 * half], x_low[2 * half + 1]);
            multiply_add(c[half], m_high[k], x_high[2 * half], x_high[2 * half + 1]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            const int out_row = i * TILE_ROWS + row + part / 2 * 8;
            const int out_column = j + half * 8 + column + part % 2;
            if (out_row < rows && out_column < width) {
              // A NaN elsewhere is none of a masked row's.
              from_float(valid[out_row] ? c[half][part] * inverse * inverse : 0,
                         grad + static_cast<long long>(out_row) * full_width + out_column);
            }
          }
        }
      }
    }
  }
};

}  // namespace rift
