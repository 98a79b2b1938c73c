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

  RIFT_BOTH constexpr bool is_y() const { return side == 1; }
  RIFT_BOTH constexpr const CkaLargeSide& own() const { return is_y() ? forward.y : forward.x; }
  RIFT_BOTH constexpr const CkaLargeSide& other() const { return is_y() ? forward.x : forward.y; }
  // Of equal widths; else W has no `other`.
  RIFT_BOTH constexpr bool near() const { return forward.x.width == forward.y.width; }

  __device__ float scalar(Scalar which) const { return forward.scalars[side * SCALARS + which]; }
  __device__ bool full() const { return scalar(FULL) != 0; }
  // What U-centering of alpha K + beta L takes off a row, of both sums.
  __device__ float taken_off(float own_sum, float other_sum) const {
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
  int turn;     // high times high, high times low, low times high
  int inner;    // where it begins

  // Where its rows of a plane begin: the high halves of P and R, then the low ones.
  RIFT_BOTH constexpr int plane_row(int width) const {
    return (turn == 1 ? 2 * width : 0) + (is_own ? 0 : width) + inner;
  }
};

// All steps of a tile in their order; the same for who fetches and who multiplies.
struct BackwardSteps {
  int size, own_steps, other_steps, own_turns, other_turns;

  RIFT_BOTH constexpr int own_count() const { return own_steps * own_turns; }
  RIFT_BOTH constexpr int count() const { return own_count() + other_steps * other_turns; }

  RIFT_BOTH constexpr BackwardStep at(int step) const {
    const bool is_own = step < own_count();
    const int within = is_own ? step : step - own_count();
    const int steps = is_own ? own_steps : other_steps;
    return {is_own, within / steps, within % steps * size};
  }
};

__device__ inline BackwardSteps backward_steps(const BackwardArguments& arguments, int size) {
  const bool full = arguments.full();
  return {size, cut(arguments.own().width, size), cut(arguments.other().width, size), full ? 3 : 1,
          full ? 2 : 1};
}

// Per column, for the end: the means' share, the rows' weighted sums, and the long rows.
struct BackwardColumn {
  float shift, weights;
  uint16_t longest[LONGEST];
};

__device__ inline BackwardColumn backward_column(const BackwardArguments& arguments, int column) {
  const CkaLargeArguments& forward = arguments.forward;
  const int width = forward.width;
  BackwardColumn result = {};
  if (column >= width) return result;
  const float* shift = (arguments.is_y() ? forward.shift_y : forward.shift_x) + column;
  const int parts =
      arguments.is_y() ? cut(forward.x.width, STRIP) : cut(forward.y.width, MOMENT_BLOCK);
  const long long low = static_cast<long long>(width / STRIP) * width;
  for (int part = 0; part < parts; ++part) {
    result.shift += shift[part * width];
    if (arguments.full()) result.shift += shift[low + part * width];
  }
  if (!forward.debiased) return result;
  const float* sums = forward.weights + 2 * arguments.side * width + column;
  result.weights = arguments.taken_off(sums[0], sums[width]);
  const CkaLargeSide& own = arguments.own();
  const auto* features = static_cast<const Bf16*>(own.features);
  for (int s = 0; s < LONGEST; ++s) {
    const int row = forward.longest[s];
    if (row >= 0 && column < own.width) result.longest[s] = features[row * own.stride + column].bits;
  }
  return result;
}

struct BackwardRow {
  float weight, longest[LONGEST];
};

// The w and the V of a row.
__device__ inline BackwardRow backward_row(const BackwardArguments& arguments,
                                           const Longest& longest, int row) {
  BackwardRow result = {};
  const CkaLargeArguments& forward = arguments.forward;
  if (!forward.debiased) return result;
  const float alpha = arguments.scalar(ROW_OWN), beta = arguments.scalar(ROW_OTHER);
  const int side = arguments.side;
  const auto term = [&](int kind, int of) {
    return forward.row_terms[kind * static_cast<long long>(forward.rows) + of];
  };
  const auto taken_off = [&](int of) {
    return arguments.taken_off(term(ROW_SUM + side, of), term(ROW_SUM + 1 - side, of));
  };
  const float from_row = taken_off(row), back = arguments.scalar(ROW);
  if (!longest.has(row)) {
    const float energy = alpha * term(ENERGY + side, row) + beta * term(ENERGY + 1 - side, row);
    result.weight = 2 * from_row - energy - back;
  }
#pragma unroll
  for (int s = 0; s < LONGEST; ++s) {
    if (s >= longest.count || longest.rows[s] == row) continue;
    const float own = term(ROW_PRODUCTS + side * LONGEST + s, row);
    const float other = term(ROW_PRODUCTS + (1 - side) * LONGEST + s, row);
    result.longest[s] =
        alpha * own + beta * other - from_row - taken_off(longest.rows[s]) + back;
  }
  return result;
}

// Writes an element of the gradient, of which `sum` has come from products.
__device__ inline void store_gradient(const BackwardArguments& arguments, float g, int row,
                                      int column, float sum, const BackwardRow& of_row,
                                      int longest, const BackwardColumn& of_column) {
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
    if (longest > 0) {
#pragma unroll
      for (int s = 0; s < LONGEST; ++s) {
        const float p = (bf16_to_float(of_column.longest[s]) - mean) * inverse;
        if (s < longest) more += of_row.longest[s] * p;
      }
    }
    value += more * inverse;
  }
  arguments.grad[static_cast<long long>(row) * own.width + column] = round_to_bf16(value * g);
}

}  // namespace rift
