// One side's gradient of linear CKA in covariance form: what its kernels share.
//
//   grad = g * (scale * (W P + Other R) [+ w * own + V long rows - mean]),    W = c own + c' other
//
// `own` and `other` centered, P and R given as two bfloat16 each (the planes of cka_large_head). W is
// formed in float32; `other` is multiplied as it is, and what its means add to every row comes off at
// the end. The low halves are multiplied where the scalars say so. Debiased, a row has its weight w,
// 0 for a long one, and its V: what U-centering leaves of alpha K + beta L in the columns of the long
// rows, itself left out; the mean is of the rows but the long ones, weighted with what U-centering
// takes off each.
#pragma once

#include "cka_large/longest.cuh"
#include "common/elements.cuh"

namespace rift {

constexpr int BACKWARD_ROWS = 128;

struct BackwardArguments {
  CkaLargeArguments forward;
  const float* incoming;
  unsigned short* grad;  // (rows, width) contiguous
  int side;              // 0: of X

  RIFT_HOST_DEVICE constexpr bool is_y() const { return side == 1; }
  RIFT_HOST_DEVICE constexpr const CkaLargeSide& own() const {
    return is_y() ? forward.y : forward.x;
  }
  RIFT_HOST_DEVICE constexpr const CkaLargeSide& other() const {
    return is_y() ? forward.x : forward.y;
  }
  // Of equal widths; else W has no `other`.
  RIFT_HOST_DEVICE constexpr bool equal_widths() const {
    return forward.x.width == forward.y.width;
  }

  __device__ float scalar(Scalar which) const { return forward.scalars[side * SCALARS + which]; }
  __device__ bool uses_low_halves() const { return scalar(LOW_HALVES) != 0; }
  // What U-centering of alpha K + beta L takes off a row, of both sums.
  __device__ float row_offset(float own_sum, float other_sum) const {
    return (scalar(ROW_OWN) * own_sum + scalar(ROW_OTHER) * other_sum) /
           static_cast<float>(forward.rows - 2);
  }
  __device__ const float* means_of_own() const { return forward.means + side * forward.width; }
  __device__ const float* means_of_other() const {
    return forward.means + (1 - side) * forward.width;
  }
};

// What one step multiplies: some of the inner dimension.
struct BackwardStep {
  bool is_own;  // W P, else Other R
  int pass;     // high times high, high times low, low times high
  int inner;    // where it begins

  // Where its rows of a plane begin: the high halves of P and R, then the low ones.
  RIFT_HOST_DEVICE constexpr int plane_row(int width) const {
    return (pass == 1 ? 2 * width : 0) + (is_own ? 0 : width) + inner;
  }
};

// All steps of a tile in their order; the same for who fetches and who multiplies.
struct BackwardSteps {
  int size, own_steps, other_steps, own_passes, other_passes;

  RIFT_HOST_DEVICE constexpr int own_count() const { return own_steps * own_passes; }
  RIFT_HOST_DEVICE constexpr int count() const { return own_count() + other_steps * other_passes; }

  RIFT_HOST_DEVICE constexpr BackwardStep at(int step) const {
    const bool is_own = step < own_count();
    const int within = is_own ? step : step - own_count();
    const int steps = is_own ? own_steps : other_steps;
    return {is_own, within / steps, within % steps * size};
  }
};

__device__ inline BackwardSteps backward_steps(const BackwardArguments& arguments, int size) {
  const bool full = arguments.uses_low_halves();
  return {size, ceil_div(arguments.own().width, size), ceil_div(arguments.other().width, size),
          full ? 3 : 1, full ? 2 : 1};
}

// Per column, for the end: the means' share, the rows' weighted sums, and the long rows.
struct BackwardColumn {
  float shift, weights;
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
  const float* sums = forward.weights + 2 * arguments.side * width + column;
  result.weights = arguments.row_offset(sums[0], sums[width]);
  const CkaLargeSide& own = arguments.own();
  const auto* features = static_cast<const Bf16*>(own.features);
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    const int row = forward.long_rows[s];
    if (row >= 0 && column < own.width)
      result.long_rows[s] = features[row * own.stride + column].bits;
  }
  return result;
}

struct BackwardRow {
  float weight, long_rows[MAX_LONG_ROWS];
};

// The w and the V of a row.
__device__ inline BackwardRow backward_row(const BackwardArguments& arguments,
                                           const LongRows& long_rows, int row) {
  BackwardRow result = {};
  const CkaLargeArguments& forward = arguments.forward;
  if (!forward.debiased) return result;
  const float alpha = arguments.scalar(ROW_OWN), beta = arguments.scalar(ROW_OTHER);
  const int side = arguments.side;
  const auto term = [&](int kind, int of) {
    return forward.row_terms[kind * static_cast<long long>(forward.rows) + of];
  };
  const auto row_offset = [&](int of) {
    return arguments.row_offset(term(ROW_SUM + side, of), term(ROW_SUM + 1 - side, of));
  };
  const float from_row = row_offset(row), back = arguments.scalar(ROW);
  if (!long_rows.has(row)) {
    const float energy = alpha * term(ENERGY + side, row) + beta * term(ENERGY + 1 - side, row);
    result.weight = 2 * from_row - energy - back;
  }
#pragma unroll
  for (int s = 0; s < MAX_LONG_ROWS; ++s) {
    if (s >= long_rows.count || long_rows.rows[s] == row) continue;
    const float own = term(ROW_PRODUCTS + side * MAX_LONG_ROWS + s, row);
    const float other = term(ROW_PRODUCTS + (1 - side) * MAX_LONG_ROWS + s, row);
    result.long_rows[s] =
        alpha * own + beta * other - from_row - row_offset(long_rows.rows[s]) + back;
  }
  return result;
}

// Writes an element of the gradient, of which `sum` has come from products.
__device__ inline void store_gradient(const BackwardArguments& arguments, float g, int row,
                                      int column, float sum, const BackwardRow& of_row,
                                      int long_count, const BackwardColumn& of_column) {
  const CkaLargeSide& own = arguments.own();
  if (column >= own.width) return;
  const float inverse = arguments.scalar(INVERSE_OWN);
  float value = (sum - of_column.shift) * (inverse * arguments.scalar(SCALE)) *
                arguments.scalar(INVERSE_OTHER);
  if (arguments.forward.debiased) {
    const auto* features = static_cast<const Bf16*>(own.features);
    const float mean = arguments.means_of_own()[column];
    const float x = to_float(features[row * own.stride + column]) - mean;
    float more = of_row.weight * (inverse * x) - of_column.weights * inverse;
    if (long_count > 0) {
#pragma unroll
      for (int s = 0; s < MAX_LONG_ROWS; ++s) {
        const float p = (bf16_to_float(of_column.long_rows[s]) - mean) * inverse;
        if (s < long_count) more += of_row.long_rows[s] * p;
      }
    }
    value += more * inverse;
  }
  arguments.grad[static_cast<long long>(row) * own.width + column] = round_to_bf16(value * g);
}

}  // namespace rift
