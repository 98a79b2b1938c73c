// One side's gradient of linear CKA in covariance form: what its kernels share.
//
//   grad = incoming * (scale * (W P + Other R) [+ w * Own + V S - m])
//   W    = c_own Own + c_other Other
//
// Own and Other are the centered features of this side and the other one. P and R are given as two
// bfloat16 each (the planes of cka_large_head). W is formed in float32. Other is multiplied without
// centering, and the contribution of its means, which is the same for all rows, is subtracted at
// the end. Low halves are multiplied if the scalars say so.
//
// Debiased, each row has a weight w, 0 for a long row, and coefficients V of the long rows, S: the
// elements of U-centered alpha K + beta L in their columns, without the diagonal. m is the sum of
// all rows but the long ones, each weighted with its offset in U-centering.
#pragma once

#include "cka_large/longest.cuh"
#include "common/elements.cuh"

namespace rift {

constexpr int BACKWARD_ROWS = 128;

struct BackwardArguments {
  CkaLargeArguments forward;
  const float* incoming;
  unsigned short* grad;  // (rows, width) contiguous
  int side;              // 0: X, 1: Y

  RIFT_HOST_DEVICE constexpr bool is_y() const { return side == 1; }
  RIFT_HOST_DEVICE constexpr const CkaLargeSide& own_side() const {
    return is_y() ? forward.y : forward.x;
  }
  RIFT_HOST_DEVICE constexpr const CkaLargeSide& other_side() const {
    return is_y() ? forward.x : forward.y;
  }
  // If the widths differ, W has no term of Other.
  RIFT_HOST_DEVICE constexpr bool equal_widths() const {
    return forward.x.width == forward.y.width;
  }

  __device__ float scalar(Scalar which) const { return forward.scalars[side * SCALARS + which]; }
  __device__ bool uses_low_halves() const { return scalar(USES_LOW_HALVES) != 0; }
  // The offset of a row in U-centering of alpha K + beta L, from its row sums in both.
  __device__ float row_offset(float own_sum, float other_sum) const {
    return (scalar(ROW_OWN) * own_sum + scalar(ROW_OTHER) * other_sum) /
           static_cast<float>(forward.rows - 2);
  }
  __device__ const float* own_means() const { return forward.means + side * forward.width; }
  __device__ const float* other_means() const { return forward.means + (1 - side) * forward.width; }
};

// A range of the inner dimension that is multiplied at once.
struct BackwardStep {
  bool is_own;  // W P, else Other R
  int pass;     // 0: high times high halves, 1: high times low, 2: low times high
  int inner;    // first element of the range

  // Its first row in the planes: the high halves of P and R come before the low ones.
  RIFT_HOST_DEVICE constexpr int plane_row(int width) const {
    return (pass == 1 ? 2 * width : 0) + (is_own ? 0 : width) + inner;
  }
};

// The steps of a tile in order, the same for producers and consumers.
struct BackwardSteps {
  int size, own_steps, other_steps, own_passes, other_passes;

  RIFT_HOST_DEVICE constexpr int own_count() const { return own_steps * own_passes; }
  RIFT_HOST_DEVICE constexpr int count() const { return own_count() + other_steps * other_passes; }

  RIFT_HOST_DEVICE constexpr BackwardStep at(int step) const {
    const bool is_own = step < own_count();
    const int index = is_own ? step : step - own_count();
    const int steps = is_own ? own_steps : other_steps;
    return {is_own, index / steps, index % steps * size};
  }
};

__device__ inline BackwardSteps backward_steps(const BackwardArguments& arguments, int size) {
  const bool uses_low_halves = arguments.uses_low_halves();
  return {size, ceil_div(arguments.own_side().width, size),
          ceil_div(arguments.other_side().width, size), uses_low_halves ? 3 : 1,
          uses_low_halves ? 2 : 1};
}

// What store_gradient needs of a column: the contribution of the means, m, and the long rows.
struct BackwardColumn {
  float shift, offset_weighted_sum;
  uint16_t long_rows[MAX_LONG_ROWS];
};

__device__ inline BackwardColumn backward_column(const BackwardArguments& arguments, int column) {
  const CkaLargeArguments& forward = arguments.forward;
  const int width = forward.width;
  BackwardColumn result = {};
  if (column >= width) return result;
  const float* shift = (arguments.is_y() ? forward.shift_y : forward.shift_x) + column;
  const int parts =
      arguments.is_y() ? ceil_div(forward.x.width, STRIP) : ceil_div(forward.y.width, MOMENT_BLOCK);
  const long long low = static_cast<long long>(width / STRIP) * width;
  for (int part = 0; part < parts; ++part) {
    result.shift += shift[part * width];
    if (arguments.uses_low_halves()) result.shift += shift[low + part * width];
  }
  if (!forward.debiased) return result;
  const float* sums = forward.weighted_sums + 2 * arguments.side * width + column;
  result.offset_weighted_sum = arguments.row_offset(sums[0], sums[width]);
  const CkaLargeSide& side = arguments.own_side();
  const auto* features = static_cast<const Bf16*>(side.features);
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    const int row = forward.long_rows[s];
    const bool exists = row >= 0 && column < side.width;
    if (exists) result.long_rows[s] = features[row * side.stride + column].bits;
  }
  return result;
}

// The w and the V of a row.
struct BackwardRow {
  float weight, long_rows[MAX_LONG_ROWS];
};

__device__ inline BackwardRow backward_row(const BackwardArguments& arguments,
                                           const LongRows& long_rows, int row) {
  BackwardRow result = {};
  const CkaLargeArguments& forward = arguments.forward;
  if (!forward.debiased) return result;
  const float alpha = arguments.scalar(ROW_OWN), beta = arguments.scalar(ROW_OTHER);
  const int side = arguments.side;
  const auto term = [&](int kind, int index) {
    return forward.row_terms[kind * static_cast<long long>(forward.rows) + index];
  };
  const auto row_offset = [&](int index) {
    return arguments.row_offset(term(ROW_SUM + side, index), term(ROW_SUM + 1 - side, index));
  };
  const float offset = row_offset(row), total = arguments.scalar(ROW_TOTAL);
  if (!long_rows.has(row)) {
    const float energy = alpha * term(ENERGY + side, row) + beta * term(ENERGY + 1 - side, row);
    result.weight = 2 * offset - energy - total;
  }
#pragma unroll
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    if (s >= long_rows.count || long_rows.rows[s] == row) continue;
    const float k = term(ROW_PRODUCTS + side * MAX_LONG_ROWS + s, row);
    const float l = term(ROW_PRODUCTS + (1 - side) * MAX_LONG_ROWS + s, row);
    result.long_rows[s] = alpha * k + beta * l - offset - row_offset(long_rows.rows[s]) + total;
  }
  return result;
}

// Stores an element of the gradient; `sum` is that of the products.
__device__ inline void store_gradient(const BackwardArguments& arguments, float incoming, int row,
                                      int column, float sum, const BackwardRow& of_row,
                                      int long_count, const BackwardColumn& of_column) {
  const CkaLargeSide& side = arguments.own_side();
  if (column >= side.width) return;
  const float inverse = arguments.scalar(INVERSE_OWN);
  float value = (sum - of_column.shift) * (inverse * arguments.scalar(SCALE)) *
                arguments.scalar(INVERSE_OTHER);
  if (arguments.forward.debiased) {
    const auto* features = static_cast<const Bf16*>(side.features);
    const float mean = arguments.own_means()[column];
    const float x = to_float(features[row * side.stride + column]) - mean;
    float debiasing = of_row.weight * (inverse * x) - of_column.offset_weighted_sum * inverse;
    if (long_count > 0) {
#pragma unroll
      for (int s = 0; s < MAX_LONG_ROWS; ++s) {
        const float p = (bf16_to_float(of_column.long_rows[s]) - mean) * inverse;
        if (s < long_count) debiasing += of_row.long_rows[s] * p;
      }
    }
    value += debiasing * inverse;
  }
  arguments.grad[static_cast<long long>(row) * side.width + column] =
      round_to_bf16(value * incoming);
}

}  // namespace rift
