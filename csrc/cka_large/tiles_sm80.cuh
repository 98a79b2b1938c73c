// Tiles of bfloat16 in shared memory for mma.sync, fetched by cp.async and read by ldmatrix.
//
// A block of 2 x 4 warps computes 128 x 128 elements of a product, and each warp 64 x 32 of them.
// The 16-byte vectors of a row are swizzled: their positions are XORed with the row's index. So the
// eight rows that ldmatrix reads at once lie in different banks.
#pragma once

#include "cka_large/tensor_map.h"
#include "common/elements.cuh"

namespace rift {

constexpr int TILE_THREADS = 256;
constexpr int TILE = 128;  // rows and columns of the product that a block computes
constexpr int VECTOR = 8;  // elements of one copy
constexpr int VECTOR_BYTES = 2 * VECTOR;

// Rows that share 128 bytes, a line of all banks, are swizzled alike.
template <int COLUMNS>
struct TileLayout {
  static constexpr int VECTORS = COLUMNS / VECTOR;
  static constexpr int SWIZZLE = VECTORS < 8 ? VECTORS : 8;
  static constexpr int ROWS_PER_LINE = 8 / SWIZZLE;

  RIFT_HOST_DEVICE static constexpr int offset(int row, int vector) {
    return (row * VECTORS + (vector ^ row / ROWS_PER_LINE % SWIZZLE)) * VECTOR_BYTES;
  }
};

// Starts to fetch a tile of ROWS x COLUMNS; zeros beyond the matrix, whose padding is not read.
template <int ROWS, int COLUMNS>
__device__ inline void fetch_tile(unsigned char* tile, const Matrix& matrix, int row, int column) {
  using Layout = TileLayout<COLUMNS>;
  constexpr int STEP = TILE_THREADS / Layout::VECTORS;
  const int vector = threadIdx.x % Layout::VECTORS, first = threadIdx.x / Layout::VECTORS;
  const int vector_column = column + vector * VECTOR;
  const int inside = min(max(matrix.columns - vector_column, 0), VECTOR);
  const auto* elements = static_cast<const uint16_t*>(matrix.elements);
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i) {
    const int tile_row = first + i * STEP;
    const int count = row + tile_row < matrix.rows ? inside : 0;
    // The address must be valid even if nothing is read.
    const long long offset = count > 0 ? (row + tile_row) * matrix.stride + vector_column : 0;
    copy_async(tile + Layout::offset(tile_row, vector), elements + offset, 2 * count);
  }
}

// A warp's operands for 16 elements of the inner dimension.
struct Fragments {
  uint32_t a[4][4], b[2][4];
};

// The row of a 16 x 16 tile whose address this lane passes to ldmatrix, which loads four 8 x 8
// matrices: first the two in the left column (column-major), or first the two in the upper row.
__device__ inline int column_major_row() { return threadIdx.x % 16; }
__device__ inline int row_major_row() { return threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8; }

// Loads 16 x 16 elements of a tile whose rows are the inner dimension. They are a left operand, or
// two right operands of 8 columns: r[0], r[2] and r[1], r[3].
__device__ inline void load_inner_rows(uint32_t (&r)[4], const unsigned char* tile, int inner,
                                       int column) {
  const int vector = column / VECTOR + threadIdx.x / 8 % 2;
  load_matrices_transposed(r, tile + TileLayout<TILE>::offset(inner + row_major_row(), vector));
}

// Loads 16 x 16 elements of a tile whose columns are the inner dimension, as a left operand.
template <int COLUMNS>
__device__ inline void load_inner_columns(uint32_t (&r)[4], const unsigned char* tile, int row,
                                          int inner) {
  const int vector = inner / VECTOR + threadIdx.x % 32 / 16;
  load_matrices(r, tile + TileLayout<COLUMNS>::offset(row + column_major_row(), vector));
}

// The first row and column of this warp's 64 x 32 elements.
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
