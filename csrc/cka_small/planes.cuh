// One side's features in the shared memory of a block of cka_small, and the products of them.
#pragma once

#include "common/elements.cuh"
#include "common/reduce.cuh"
#include "common/symmetric_tiles.h"

namespace rift {

// The columns of one side that a block owns, in two planes of 16-bit halves, each (ROWS,
// block_columns).
template <int ROWS>
struct Planes {
  uint16_t *high, *low;
  int pitch, block_columns;

  // Loads features as float32: the planes hold the upper and lower 16 bits. Masked rows and columns
  // beyond `width` become 0.
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
    // Loads in flight for each thread.
    constexpr int BATCH = 4;
    const int threads = blockDim.x, row_steps = block_columns / SIZE, steps = ROWS * row_steps;
    for (int first = threadIdx.x; first < steps; first += threads * BATCH) {
      Vector<T, SIZE> loaded[BATCH] = {};
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int step = first + i * threads, row = step / row_steps;
        const int column = step % row_steps * SIZE;
        if (step >= steps || !valid[row]) continue;
        const T* source = features + row * stride_n + column * stride_d;
        if (column + SIZE <= width) {
          loaded[i] = *reinterpret_cast<const Vector<T, SIZE>*>(source);
        } else {
          for (int k = 0; k < SIZE; ++k) {
            if (column + k < width) loaded[i].elements[k] = source[k];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int step = first + i * threads;
        const int offset = step / row_steps * pitch + step % row_steps * SIZE;
        if (step >= steps) continue;
        Vector<uint16_t, SIZE> high_bits, low_bits;
#pragma unroll
        for (int k = 0; k < SIZE; ++k) {
          const uint32_t bits = float_to_bits(to_float(loaded[i].elements[k]));
          high_bits.elements[k] = static_cast<uint16_t>(bits >> 16);
          low_bits.elements[k] = static_cast<uint16_t>(bits);
        }
        *reinterpret_cast<Vector<uint16_t, SIZE>*>(high + offset) = high_bits;
        *reinterpret_cast<Vector<uint16_t, SIZE>*>(low + offset) = low_bits;
      }
    }
  }

  // Centers every column and stores it as a sum of two bfloat16. A constant column becomes exactly
  // 0. Returns this thread's part of the energy of the columns about their first valid row.
  //
  // Half a warp owns two columns at a time; each lane holds every 16th row of them in registers.
  __device__ float center(const unsigned char* valid, int first, int count) const {
    constexpr int LANES = 16, STEPS = ROWS / LANES;
    const int lane = threadIdx.x % LANES;
    float pivot_energy = 0;
    for (int column = threadIdx.x / LANES * 2; column < block_columns;
         column += blockDim.x / LANES * 2) {
      float pivot[2] = {}, x[STEPS][2], mean[2] = {};
      if (first < ROWS) read_pair(first * pitch + column, pivot);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        read_pair((lane + i * LANES) * pitch + column, x[i]);
        const bool is_valid = valid[lane + i * LANES];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          x[i][k] = is_valid ? x[i][k] - pivot[k] : 0;
          pivot_energy += x[i][k] * x[i][k];
        }
      }
      // The second pass computes the mean that rounding left after the first.
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
        const bool is_valid = valid[lane + i * LANES];
        uint32_t high_pair, low_pair;
        split_pair(is_valid ? x[i][0] - mean[0] : 0, is_valid ? x[i][1] - mean[1] : 0, high_pair,
                   low_pair);
        const int offset = (lane + i * LANES) * pitch + column;
        *reinterpret_cast<uint32_t*>(high + offset) = high_pair;
        *reinterpret_cast<uint32_t*>(low + offset) = low_pair;
      }
    }
    return pivot_energy;
  }

  // Reads two adjacent elements of a row, as load() stored them.
  __device__ void read_pair(int offset, float (&x)[2]) const {
    const uint32_t high_pair = *reinterpret_cast<const uint32_t*>(high + offset);
    const uint32_t low_pair = *reinterpret_cast<const uint32_t*>(low + offset);
    x[0] = bits_to_float(high_pair << 16 | (low_pair & 0xFFFF));
    x[1] = bits_to_float((high_pair & 0xFFFF0000) | low_pair >> 16);
  }

  // Offset of the row of a 16 x 16 tile whose address this lane passes to load_matrices.
  __device__ int lane_row(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return (row + lane % 16) * pitch + column + lane / 16 * 8;
  }

  // Computes a tile of X X^T, summed over this block's columns.
  __device__ void gram_tile(TileCoord tile, float* out) const {
    float c[2][4] = {};
    for (int k = 0; k < block_columns; k += TILE_ROWS) {
      uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
      load_matrices(a_high, high + lane_row(tile.i * TILE_ROWS, k));
      load_matrices(a_low, low + lane_row(tile.i * TILE_ROWS, k));
      load_matrices(b_high, high + lane_row(tile.j * TILE_ROWS, k));
      load_matrices(b_low, low + lane_row(tile.j * TILE_ROWS, k));
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

  // Computes this block's columns of (c_own K_own + c_other K_other) X.
  template <typename G>
  __device__ void gradient(const float* k_own, const float* k_other, float c_own, float c_other,
                           float inverse, const unsigned char* valid, G* grad, int rows, int width,
                           int full_width) const {
    constexpr int TILES = ROWS / TILE_ROWS;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    // Warps share out the rows of tiles and, if there are more warps, the columns as well.
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
          const int first = element_offset(m_row, m_column);
          const int second = element_offset(m_row, m_column + 1);
          split_pair(c_own * k_own[first] + c_other * k_other[first],
                     c_own * k_own[second] + c_other * k_other[second], m_high[k][part],
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
              // The product may be NaN because of other rows; a masked row's gradient is 0.
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
