// One side's features in the shared memory of a block of cka_small, and the products of them.
//
// A warp copies and centers 16 columns at a time: first it starts all its copies, then it waits.
// Lanes are numbered so that 8 of them, which access shared memory at once, touch all banks, and
// whole sectors of global memory: lane l takes 8 columns, the left ones if l is even, of row
// row_of_lane() in every 16 rows.
//
// Each 16 columns are stored in the order 0 1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15. A lane of a warp's
// product, which holds columns 2 t, 2 t + 1 of either half, then has 4 adjacent columns of the
// gradient: a multiple of 8 bytes.
#pragma once

#include "cka_small/layout.h"
#include "cka_small/row_set.cuh"
#include "common/elements.cuh"
#include "common/reduce.cuh"
#include "common/symmetric_tiles.h"

namespace rift {

// The columns of one side that a block owns, in two planes of 16-bit halves, each (ROWS,
// block_columns).
template <int ROWS>
struct Planes {
  static constexpr int TILES = ROWS / TILE_ROWS;
  // Columns that a lane centers.
  static constexpr int LANE_COLUMNS = 8;

  uint16_t *high, *low;
  int pitch, block_columns;

  __device__ static int row_of_lane() {
    const int lane = threadIdx.x % 32;
    return lane / 2 % 4 * 2 + lane / 8 % 2 + lane / 16 * 8;
  }

  // Where a feature lies before it is centered. Float32 takes both planes, 16 bytes in turn, so that
  // a warp reads features where it will write the halves of the same ones.
  template <typename T>
  __device__ T* staged(int row, int column) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
    uint16_t* plane = column % LANE_COLUMNS < SIZE ? high : low;
    plane += row * pitch + column / LANE_COLUMNS * LANE_COLUMNS;
    return reinterpret_cast<T*>(plane) + column % SIZE;
  }

  // Starts to copy 16 columns; zeros beyond `rows` and `width`. Features are those of this block.
  template <typename T>
  __device__ void copy(const T* features, long long stride_n, long long stride_d, int rows,
                       int width, int column) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
    const int lane = threadIdx.x % 32;
    if (stride_d == 1 && stride_n % SIZE == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const int row = i * TILE_ROWS + row_of_lane();
#pragma unroll
        for (int k = 0; k < TILE_ROWS; k += 2 * SIZE) {
          const int first = column + k + lane % 2 * SIZE;
          const int elements = row < rows ? max(0, min(width - first, SIZE)) : 0;
          copy_async(staged<T>(row, first), features + row * stride_n + first,
                     elements * static_cast<int>(sizeof(T)));
        }
      }
    } else {
#pragma unroll 8
      for (int row = lane / TILE_ROWS; row < ROWS; row += 2) {
        const int own = column + lane % TILE_ROWS;
        *staged<T>(row, own) =
            row < rows && own < width ? features[row * stride_n + own * stride_d] : T{};
      }
    }
  }

  // The columns that this lane centers, of one row.
  template <typename T>
  __device__ void read(int row, int column, float (&x)[LANE_COLUMNS]) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int k = 0; k < LANE_COLUMNS; k += SIZE) {
      const auto part = *reinterpret_cast<const Vector<T, SIZE>*>(staged<T>(row, column + k));
#pragma unroll
      for (int i = 0; i < SIZE; ++i) x[k + i] = to_float(part.elements[i]);
    }
  }

  // Centers 16 columns and stores them as sums of two bfloat16; rows that are not valid become 0.
  // `means`: memory of this warp. Sums are taken about the first valid row, so that a column that
  // does not vary becomes exactly 0, and a large mean costs no precision.
  template <typename T>
  __device__ void center(const RowSet<ROWS>& valid, float inverse_count, int column,
                         float* means) const {
    const int lane = threadIdx.x % 32, own = column + lane % 2 * LANE_COLUMNS;
    const int pivot_row = valid.first();
    float pivot[LANE_COLUMNS], x[TILES][LANE_COLUMNS], sums[LANE_COLUMNS] = {};
    read<T>(pivot_row, own, pivot);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const bool is_valid = valid.of_tile(i) >> row_of_lane() & 1;
      read<T>(is_valid ? i * TILE_ROWS + row_of_lane() : pivot_row, own, x[i]);
#pragma unroll
      for (int k = 0; k < LANE_COLUMNS; ++k) {
        x[i][k] -= pivot[k];
        sums[k] += x[i][k];
      }
    }
    // Over the 16 lanes with the same columns; each then holds the mean of one column.
    const float mean = scatter_sum<2, 16>(sums) * inverse_count;
    means[lane % 2 * LANE_COLUMNS + lane / 4] = mean;
    __syncwarp();
    const auto* mine =
        reinterpret_cast<const Vector<float, LANE_COLUMNS / 2>*>(means + lane % 2 * LANE_COLUMNS);
    const Vector<float, LANE_COLUMNS / 2> mean_of[2] = {mine[0], mine[1]};
    // Other lanes overwrite what these lanes have read, and the means of the next columns.
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const float weight = valid.of_tile(i) >> row_of_lane() & 1 ? 1 : 0;
      const int offset = (i * TILE_ROWS + row_of_lane()) * pitch + column + lane % 2 * 4;
      // Columns 0, 1, 4 and 5, then 2, 3, 6 and 7.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<uint32_t, 2> high_pairs, low_pairs;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int k = 4 * pair + 2 * half;
          split_pair(x[i][k] - weight * mean_of[pair].elements[2 * half],
                     x[i][k + 1] - weight * mean_of[pair].elements[2 * half + 1],
                     high_pairs.elements[pair], low_pairs.elements[pair]);
        }
        *reinterpret_cast<Vector<uint32_t, 2>*>(high + offset + 8 * half) = high_pairs;
        *reinterpret_cast<Vector<uint32_t, 2>*>(low + offset + 8 * half) = low_pairs;
      }
    }
  }

  // Offset of the row of a 16 x 16 tile whose address this lane passes to load_matrices.
  __device__ int lane_row(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return (row + lane % 16) * pitch + column + lane / 16 * 8;
  }

  // Computes tiles (row, row), (row, row + 1), ... of X X^T, summed over this block's columns, and
  // passes them to `use`. All of them have the left operand in common, which is also the first right
  // one.
  template <typename Use>
  __device__ void gram_row(int row, const Use& use) const {
    // A single tile would wait for each product; its three products have sums of their own.
    constexpr int SETS = TILES > 2 ? 1 : 3;
    float c[SETS][TILES][2][4] = {};
    for (int k = 0; k < block_columns; k += TILE_ROWS) {
      uint32_t x_high[TILES][4], x_low[TILES][4];
#pragma unroll
      for (int d = 0; d < TILES; ++d) {
        if (row + d < TILES) {
          load_matrices(x_high[d], high + lane_row((row + d) * TILE_ROWS, k));
          load_matrices(x_low[d], low + lane_row((row + d) * TILE_ROWS, k));
        }
      }
#pragma unroll
      for (int d = 0; d < TILES; ++d) {
        if (row + d < TILES) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply_add(c[0][d][half], x_low[0], x_high[d][half], x_high[d][half + 2]);
            multiply_add(c[1 % SETS][d][half], x_high[0], x_low[d][half], x_low[d][half + 2]);
            multiply_add(c[2 % SETS][d][half], x_high[0], x_high[d][half], x_high[d][half + 2]);
          }
        }
      }
    }
#pragma unroll
    for (int d = 0; d < TILES; ++d) {
      if (row + d < TILES) {
#pragma unroll
        for (int set = 1; set < SETS; ++set) {
#pragma unroll
          for (int i = 0; i < 8; ++i) c[0][d][i / 4][i % 4] += c[set][d][i / 4][i % 4];
        }
        use(TileCoord{row, row + d}, c[0][d]);
      }
    }
  }

  // Computes this block's columns of scale^2 M X; see GramTiles::store_matrix for M.
  template <typename G>
  __device__ void gradient(const uint16_t* matrix, float scale, const RowSet<ROWS>& valid, G* grad,
                           int rows, int width, int full_width) const {
    // Warps share out the rows of tiles and, if there are more warps, the columns as well.
    constexpr int ROW_GROUPS = TILES < CKA_SMALL_WARPS / 2 ? TILES : CKA_SMALL_WARPS / 2;
    constexpr int TALL = TILES / ROW_GROUPS, ACROSS = CKA_SMALL_WARPS / ROW_GROUPS, WIDE = 4;
    const int warp = threadIdx.x / 32, row = warp / ACROSS * TALL;
    const int column_tiles = block_columns / TILE_ROWS;
    for (int first = warp % ACROSS; first < column_tiles; first += ACROSS * WIDE) {
      float c[TALL][WIDE][2][4] = {};
      for (int k = 0; k < TILES; ++k) {
        uint32_t m_high[TALL][4], m_low[TALL][4], x_high[WIDE][4], x_low[WIDE][4];
#pragma unroll
        for (int i = 0; i < TALL; ++i) load_tile(matrix, row + i, k, m_high[i], m_low[i]);
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          if (first + j * ACROSS < column_tiles) {
            const int offset = lane_row(k * TILE_ROWS, (first + j * ACROSS) * TILE_ROWS);
            load_matrices_transposed(x_high[j], high + offset);
            load_matrices_transposed(x_low[j], low + offset);
          }
        }
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          if (first + j * ACROSS < column_tiles) {
#pragma unroll
            for (int i = 0; i < TALL; ++i) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float(&sum)[4] = c[i][j][half];
                multiply_add(sum, m_low[i], x_high[j][2 * half], x_high[j][2 * half + 1]);
                multiply_add(sum, m_high[i], x_low[j][2 * half], x_low[j][2 * half + 1]);
                multiply_add(sum, m_high[i], x_high[j][2 * half], x_high[j][2 * half + 1]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < TALL; ++i) {
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          if (first + j * ACROSS < column_tiles) {
            store_gradient(c[i][j], scale, valid, row + i, first + j * ACROSS, grad, rows, width,
                           full_width);
          }
        }
      }
    }
  }

 private:
  // Loads a tile of M as a left operand. Below the diagonal, it is the transpose of one above.
  __device__ static void load_tile(const uint16_t* matrix, int i, int j, uint32_t (&tile_high)[4],
                                   uint32_t (&tile_low)[4]) {
    const uint16_t* tile = matrix + 2 * TILE_FLOATS * tile_index(min(i, j), max(i, j));
    const uint16_t* lane_high = tile + threadIdx.x % 32 * 8;
    const uint16_t* lane_low = lane_high + TILE_FLOATS;
    if (i <= j) {
      load_matrices(tile_high, lane_high);
      load_matrices(tile_low, lane_low);
    } else {
      uint32_t high_parts[4], low_parts[4];
      load_matrices_transposed(high_parts, lane_high);
      load_matrices_transposed(low_parts, lane_low);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        tile_high[part] = high_parts[part % 2 * 2 + part / 2];
        tile_low[part] = low_parts[part % 2 * 2 + part / 2];
      }
    }
  }

  template <typename G>
  __device__ static void store_gradient(const float (&c)[2][4], float scale,
                                        const RowSet<ROWS>& valid, int tile_row, int tile_column,
                                        G* grad, int rows, int width, int full_width) {
    using Quad = Vector<G, 4>;
    const int lane = threadIdx.x % 32, column = tile_column * TILE_ROWS + lane % 4 * 4;
    const bool is_aligned =
        full_width % 4 == 0 && reinterpret_cast<uintptr_t>(grad) % sizeof(Quad) == 0;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row_of_tile = lane / 4 + part * 8, row = tile_row * TILE_ROWS + row_of_tile;
      // The product may be NaN because of other rows; a masked row's gradient is 0.
      const bool is_valid = valid.of_tile(tile_row) >> row_of_tile & 1;
      Quad quad;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        from_float(is_valid ? c[k / 2][2 * part + k % 2] * scale * scale : 0, &quad.elements[k]);
      }
      if (row >= rows) continue;
      G* target = grad + static_cast<long long>(row) * full_width + column;
      if (is_aligned && column + 4 <= width) {
        *reinterpret_cast<Quad*>(target) = quad;
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (column + k < width) target[k] = quad.elements[k];
        }
      }
    }
  }
};

}  // namespace rift
