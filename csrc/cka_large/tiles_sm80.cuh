// Tiles of bfloat16 in shared memory for mma.sync: fetched by cp.async, read by ldmatrix.
//
// A block of 8 warps, 2 x 4, multiplies 128 x 128: a warp 64 x 32 of it. Of the 16-byte vectors of a
// row the numbers are mixed with the row's, so that the eight rows that ldmatrix reads at once lie in
// different banks.
#pragma once

#include "cka_large/tensor_map.h"
#include "common/elements.cuh"

namespace rift {

constexpr int TILE_THREADS = 256;
constexpr int TILE = 128;  // rows and columns that a block multiplies
constexpr int VECTOR = 8;  // elements that are copied at once
constexpr int VECTOR_BYTES = 2 * VECTOR;

// Vectors of a row, and which rows have the same mixture: those that share 128 bytes.
template <int COLUMNS>
struct TileLayout {
  static constexpr int VECTORS = COLUMNS / VECTOR;
  static constexpr int MIXED = VECTORS < 8 ? VECTORS : 8;
  static constexpr int ROWS_A_LINE = 8 / MIXED;

  RIFT_HOST_DEVICE static constexpr int offset(int row, int vector) {
    return (row * VECTORS + (vector ^ row / ROWS_A_LINE % MIXED)) * VECTOR_BYTES;
  }
};

// Starts to fetch ROWS x COLUMNS of a matrix, zeros where it has none; its padding is not read.
template <int ROWS, int COLUMNS>
__device__ inline void fetch_tile(unsigned char* to, const Matrix& matrix, int row, int column) {
  using Layout = TileLayout<COLUMNS>;
  constexpr int STEP = TILE_THREADS / Layout::VECTORS;
  const int vector = threadIdx.x % Layout::VECTORS, first = threadIdx.x / Layout::VECTORS;
  const int at = column + vector * VECTOR;
  const int inside = min(max(matrix.columns - at, 0), VECTOR);
  const auto* from = static_cast<const uint16_t*>(matrix.elements);
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i) {
    const int within = first + i * STEP;
    const int count = row + within < matrix.rows ? inside : 0;
    // Where nothing is read, the address has to be one nevertheless.
    const long long skipped = count > 0 ? (row + within) * matrix.stride + at : 0;
    copy_async(to + Layout::offset(within, vector), from + skipped, 2 * count);
  }
}

// A warp's operands of one step of 16.
struct Fragments {
  uint32_t a[4][4], b[2][4];
};

// This lane's row in ldmatrix: four 8 x 8 matrices, those of the left column of two first, or those of
// the upper row of two.
__device__ inline int lane_down() { return threadIdx.x % 16; }
__device__ inline int lane_across() { return threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8; }

// Of rows that are the inner dimension: 16 columns of 16 rows. As the left operand, or as the right
// one, whose two halves of 8 columns are r[0], r[2] and r[1], r[3].
__device__ inline void load_inner_rows(uint32_t (&r)[4], const unsigned char* tile, int inner,
                                       int column) {
  const int vector = column / VECTOR + threadIdx.x / 8 % 2;
  load_matrices_transposed(r, tile + TileLayout<TILE>::offset(inner + lane_across(), vector));
}

// Of columns that are the inner dimension: the left operand of 16 rows.
template <int COLUMNS>
__device__ inline void load_inner_columns(uint32_t (&r)[4], const unsigned char* tile, int row,
                                          int inner) {
  const int vector = inner / VECTOR + threadIdx.x % 32 / 16;
  load_matrices(r, tile + TileLayout<COLUMNS>::offset(row + lane_down(), vector));
}

// Where this warp's 64 x 32 begin.
__device__ inline int warp_row() { return threadIdx.x / 128 * 64; }
__device__ inline int warp_column() { return threadIdx.x / 32 % 4 * 32; }

__device__ inline void load_right(Fragments& fragments, const unsigned char* tile, int inner) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    load_inner_rows(fragments.b[j], tile, inner, warp_column() + 16 * j);
  }
}

__device__ inline void multiply_add(float (&c)[4][4][4], const Fragments& fragments) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t (&b)[4] = fragments.b[j / 2];
      multiply_add(c[i][j], fragments.a[i], b[j % 2], b[j % 2 + 2]);
    }
  }
}

}  // namespace rift
