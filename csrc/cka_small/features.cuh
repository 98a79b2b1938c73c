// One side's features in the shared memory of a block of cka_small, and the products of them.
//
// They lie in units of 16 columns. A warp copies and centers a unit at a time: it first starts all
// its copies, then it waits. Lane l takes 8 columns, the left ones if l is even, of row l / 2 in
// every 16 rows. So lanes that access memory at once touch all banks and whole sectors.
//
// Columns of a unit are stored in the order 0 1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15. A lane of a
// warp's product, which holds columns 2 t, 2 t + 1 of either half, then has 4 adjacent columns of
// the gradient, and 4 lanes have a sector of it.
#pragma once

#include "cka_small/layout.h"
#include "cka_small/row_set.cuh"
#include "common/elements.cuh"
#include "common/reduce.cuh"
#include "common/symmetric_tiles.h"

namespace rift {

// A unit: (ROWS, 16) high halves of bfloat16, then the low ones. A row is two vectors of 16 bytes,
// which change places in every second four rows: the 8 rows that ldmatrix reads are then in
// different banks.
template <int ROWS>
struct Unit {
  static constexpr int TILES = ROWS / TILE_ROWS;
  // Columns that a lane centers.
  static constexpr int LANE_COLUMNS = 8;
  static constexpr int ROW_BYTES = 32, TILE_BYTES = TILE_ROWS * ROW_BYTES;
  // From a high half to its low half. The two are in different banks as well.
  static constexpr int LOW = ROWS * ROW_BYTES + 16;

  unsigned char* memory;

  __device__ static int offset(int row, int vector) {
    return row * ROW_BYTES + (vector ^ (row / 4 % 2)) * 16;
  }

  // Where a feature lies before it is centered. Float32 takes the memory of both halves, so that a
  // lane writes the halves where it has read the features.
  template <typename T>
  __device__ T* staged(int row, int column) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
    unsigned char* half = column % LANE_COLUMNS < SIZE ? memory : memory + LOW;
    return reinterpret_cast<T*>(half + offset(row, column / LANE_COLUMNS)) + column % SIZE;
  }

  // Starts to copy the features of a unit; zeros beyond `rows` and `columns`.
  template <typename T>
  __device__ void copy(const T* features, long long stride_n, long long stride_d, int rows,
                       int columns) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
    const int lane = threadIdx.x % 32;
    if (stride_d == 1 && stride_n % SIZE == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0) {
#pragma unroll
      for (int k = 0; k < TILE_ROWS; k += 2 * SIZE) {
        const int column = k + lane % 2 * SIZE;
        const int bytes = max(0, min(columns - column, SIZE)) * static_cast<int>(sizeof(T));
        const T* source = features + lane / 2 * stride_n + column;
#pragma unroll
        for (int i = 0; i < TILES; ++i, source += TILE_ROWS * stride_n) {
          const int row = i * TILE_ROWS + lane / 2;
          copy_async(staged<T>(row, column), source, row < rows ? bytes : 0);
        }
      }
    } else {
      const int column = lane % TILE_ROWS;
#pragma unroll 8
      for (int row = lane / TILE_ROWS; row < ROWS; row += 2) {
        *staged<T>(row, column) =
            row < rows && column < columns ? features[row * stride_n + column * stride_d] : T{};
      }
    }
  }

  // The features that this lane centers, of one row.
  template <typename T>
  __device__ void read(int row, float (&x)[LANE_COLUMNS]) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int k = 0; k < LANE_COLUMNS; k += SIZE) {
      const auto part = *reinterpret_cast<const Vector<T, SIZE>*>(
          staged<T>(row, threadIdx.x % 2 * LANE_COLUMNS + k));
#pragma unroll
      for (int i = 0; i < SIZE; ++i) x[k + i] = to_float(part.elements[i]);
    }
  }

  // Centers the features and stores them as sums of two bfloat16; rows that are not valid become 0.
  // `means`: memory of this warp. Sums are taken about the first valid row, so that a column that
  // does not vary becomes exactly 0, and a large mean costs no precision.
  template <typename T>
  __device__ void center(const RowSet<ROWS>& valid, float inverse_count, float* means) const {
    const int lane = threadIdx.x % 32, pivot_row = valid.first();
    float pivot[LANE_COLUMNS], x[TILES][LANE_COLUMNS], sums[LANE_COLUMNS] = {};
    read<T>(pivot_row, pivot);
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const bool is_valid = valid.of_tile(i) >> lane / 2 & 1;
      read<T>(is_valid ? i * TILE_ROWS + lane / 2 : pivot_row, x[i]);
#pragma unroll
      for (int k = 0; k < LANE_COLUMNS; ++k) {
        x[i][k] -= pivot[k];
        sums[k] += x[i][k];
      }
    }
    // Over the 16 lanes with the same columns; each then holds the mean of one column.
    means[lane % 2 * LANE_COLUMNS + lane / 4] = scatter_sum<2, 16>(sums) * inverse_count;
    // From here on, lanes overwrite what others have read.
    __syncwarp();
    const auto* mine = reinterpret_cast<const Vector<float, 4>*>(means + lane % 2 * LANE_COLUMNS);
    const Vector<float, 4> mean[2] = {mine[0], mine[1]};
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const float weight = valid.of_tile(i) >> lane / 2 & 1 ? 1 : 0;
      // Columns 0, 1, 4 and 5, then 2, 3, 6 and 7.
#pragma unroll
      for (int vector = 0; vector < 2; ++vector) {
        uint32_t high[2], low[2];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int k = 4 * pair + 2 * vector;
          split_pair(x[i][k] - weight * mean[pair].elements[2 * vector],
                     x[i][k + 1] - weight * mean[pair].elements[2 * vector + 1], high[pair],
                     low[pair]);
        }
        unsigned char* target =
            memory + offset(i * TILE_ROWS + lane / 2, vector) + lane % 2 * 8;
        *reinterpret_cast<uint64_t*>(target) = high[0] | uint64_t{high[1]} << 32;
        *reinterpret_cast<uint64_t*>(target + LOW) = low[0] | uint64_t{low[1]} << 32;
      }
    }
    // The next unit's means take the place of these.
    __syncwarp();
  }

  // The row of a tile that this lane passes to load_matrices.
  __device__ const unsigned char* lane_row() const {
    return memory + offset(threadIdx.x % 16, threadIdx.x % 32 / 16);
  }
};

// The columns of one side that a block owns.
template <int ROWS>
struct Features {
  static constexpr int TILES = Unit<ROWS>::TILES, TILE_BYTES = Unit<ROWS>::TILE_BYTES;
  static constexpr int UNIT_BYTES = unit_bytes(ROWS), LOW = Unit<ROWS>::LOW;

  unsigned char* memory;
  int units;

  __device__ Unit<ROWS> unit(int i) const { return {memory + i * UNIT_BYTES}; }

  // Computes tiles (row, row), (row, row + 1), ... of Xc Xc^T, summed over this block's columns,
  // and passes them to `use`. They share the left operand, which is also the first right one.
  template <typename Use>
  __device__ void gram_row(int row, const Use& use) const {
    // A single tile would wait for each product; its three products have sums of their own.
    constexpr int SETS = TILES > 2 ? 1 : 3;
    float c[SETS][TILES][2][4] = {};
    // Rows 0 to 7, both vectors, then rows 8 to 15: the order of a right operand. A left operand
    // has the left vector of all rows first.
    const int lane = threadIdx.x % 32;
    const unsigned char* lane_row = memory + row * TILE_BYTES +
                                    Unit<ROWS>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll 1
    for (int k = 0; k < units; ++k, lane_row += UNIT_BYTES) {
      uint32_t high[TILES][4], low[TILES][4];
#pragma unroll
      for (int d = 0; d < TILES; ++d) {
        if (row + d < TILES) {
          load_matrices(high[d], lane_row + d * TILE_BYTES);
          load_matrices(low[d], lane_row + d * TILE_BYTES + LOW);
        }
      }
      const uint32_t left_high[4] = {high[0][0], high[0][2], high[0][1], high[0][3]};
      const uint32_t left_low[4] = {low[0][0], low[0][2], low[0][1], low[0][3]};
      // Each sum has to wait for its last product, so the others come in between.
#pragma unroll
      for (int product = 0; product < 3; ++product) {
        const uint32_t(&left)[4] = product == 0 ? left_low : left_high;
#pragma unroll
        for (int d = 0; d < TILES; ++d) {
          const uint32_t(&right)[4] = product == 1 ? low[d] : high[d];
          if (row + d < TILES) {
            multiply_add(c[product % SETS][d][0], left, right[0], right[1]);
            multiply_add(c[product % SETS][d][1], left, right[2], right[3]);
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

  // Computes this block's columns of scale^2 M Xc; see GramTiles::store_matrix for M.
  template <typename G>
  __device__ void gradient(const uint16_t* matrix, float scale, const RowSet<ROWS>& valid, G* grad,
                           int rows, int width, int full_width) const {
    // Warps share out the rows of tiles and, where there are more warps, the columns as well: 8
    // units at a time.
    constexpr int ROW_GROUPS = TILES < CKA_SMALL_WARPS / 2 ? TILES : CKA_SMALL_WARPS / 2;
    constexpr int TALL = TILES / ROW_GROUPS, ACROSS = CKA_SMALL_WARPS / ROW_GROUPS;
    constexpr int WIDE = 8 / ACROSS;
    const int warp = threadIdx.x / 32, row = warp / ACROSS * TALL;
    for (int first = warp % ACROSS; first < units; first += ACROSS * WIDE) {
      float c[TALL][WIDE][2][4] = {};
      const unsigned char* lane_row = unit(first).lane_row();
#pragma unroll 1
      for (int k = 0; k < TILES; ++k, lane_row += TILE_BYTES) {
        uint32_t m_high[TALL][4], m_low[TALL][4], x_high[WIDE][4], x_low[WIDE][4];
#pragma unroll
        for (int i = 0; i < TALL; ++i) load_tile(matrix, row + i, k, m_high[i], m_low[i]);
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          if (first + j * ACROSS < units) {
            load_matrices_transposed(x_high[j], lane_row + j * ACROSS * UNIT_BYTES);
            load_matrices_transposed(x_low[j], lane_row + j * ACROSS * UNIT_BYTES + LOW);
          }
        }
#pragma unroll
        for (int product = 0; product < 3; ++product) {
#pragma unroll
          for (int j = 0; j < WIDE; ++j) {
            const uint32_t(&right)[4] = product == 1 ? x_low[j] : x_high[j];
            if (first + j * ACROSS < units) {
#pragma unroll
              for (int i = 0; i < TALL; ++i) {
                const uint32_t(&left)[4] = product == 0 ? m_low[i] : m_high[i];
                multiply_add(c[i][j][0], left, right[0], right[1]);
                multiply_add(c[i][j][1], left, right[2], right[3]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < TALL; ++i) {
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
          if (first + j * ACROSS < units) {
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
    using Four = Vector<G, 4>;
    const int lane = threadIdx.x % 32, column = tile_column * TILE_ROWS + lane % 4 * 4;
    const bool is_aligned =
        full_width % 4 == 0 && reinterpret_cast<uintptr_t>(grad) % sizeof(Four) == 0;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row_of_tile = lane / 4 + part * 8, row = tile_row * TILE_ROWS + row_of_tile;
      // The product may be NaN because of other rows; a masked row's gradient is 0.
      const bool is_valid = valid.of_tile(tile_row) >> row_of_tile & 1;
      Four four;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        from_float(is_valid ? c[k / 2][2 * part + k % 2] * scale * scale : 0, &four.elements[k]);
      }
      if (row >= rows) continue;
      G* target = grad + static_cast<long long>(row) * full_width + column;
      if (is_aligned && column + 4 <= width) {
        *reinterpret_cast<Four*>(target) = four;
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (column + k < width) target[k] = four.elements[k];
        }
      }
    }
  }
};

}  // namespace rift
