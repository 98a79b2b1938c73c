// The valid rows of a layer, in registers.
#pragma once

#include "common/primitives.cuh"
#include "common/symmetric_tiles.h"

namespace rift {

template <int ROWS>
struct RowSet {
  // Rows up to 64, and those beyond. An array would be in local memory, because its index varies.
  uint64_t lower, upper;

  // `mask`: as loaded by each lane for the rows lane, lane + 32, ...
  __device__ explicit RowSet(const unsigned char (&mask)[(ROWS + 31) / 32]) : lower(0), upper(0) {
#pragma unroll
    for (int i = 0; i < (ROWS + 31) / 32; ++i) {
      const uint64_t rows = __ballot_sync(0xffffffffu, mask[i] != 0);
      (i < 2 ? lower : upper) |= rows << i % 2 * 32;
    }
  }

  // Rows of a tile, the first in the lowest bit.
  __device__ uint32_t of_tile(int tile) const {
    const uint64_t rows = ROWS > 64 && tile >= 4 ? upper : lower;
    return static_cast<uint32_t>(rows >> tile % 4 * TILE_ROWS);
  }

  __device__ int count() const { return __popcll(lower) + __popcll(upper); }

  __device__ static int trailing_zeros(uint64_t rows) { return __popcll(~rows & (rows - 1)); }

  // The first row; 0 if there is none.
  __device__ int first() const {
    return lower ? trailing_zeros(lower) : upper ? 64 + trailing_zeros(upper) : 0;
  }
};

}  // namespace rift
