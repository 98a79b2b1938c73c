// The long rows, which debiased CKA treats separately; longest.cuh finds them.
#pragma once

#include "cka_large/feature_stream.cuh"

namespace rift {

// The rows of S, longest first, in the registers of every thread.
struct LongRows {
  int rows[MAX_LONG_ROWS];
  int count;

  __device__ bool has(int row) const {
    bool equal = false;
#pragma unroll
    for (int s = 0; s < MAX_LONG_ROWS; ++s) equal = equal || rows[s] == row;
    return equal;
  }
};

__device__ inline LongRows no_long_rows() { return {{-1, -1, -1, -1, -1, -1, -1, -1}, 0}; }

__device__ inline LongRows read_long_rows(const CkaLargeArguments& arguments) {
  LongRows long_rows;
  long_rows.count = 0;
#pragma unroll
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    long_rows.rows[s] = arguments.debiased ? arguments.long_rows[s] : -1;
    long_rows.count += long_rows.rows[s] >= 0;
  }
  return long_rows;
}

}  // namespace rift
