// One side's gradient of linear CKA in covariance form: what its kernels share.
//
//   grad = g * (scale * (W P + Other R) + w * own),    W = c own + c' other
//
// `own` and `other` centered, P and R given as two bfloat16 each (the planes of covariance_head). W is
// formed in float32; `other` is multiplied as it is, and what its means add to every row comes off at
// the end. The low halves are multiplied where the scalars say so.
#pragma once

#include "covariance_layout.h"
#include "types.cuh"

namespace rift {

constexpr int BACKWARD_ROWS = 128;

struct BackwardArguments {
  CovarianceArguments forward;
  const float* incoming;
  unsigned short* grad;  // (rows, width) contiguous
  int side;              // 0: of X

  RIFT_BOTH constexpr bool is_y() const { return side == 1; }
  RIFT_BOTH constexpr const CovarianceSide& own() const { return is_y() ? forward.y : forward.x; }
  RIFT_BOTH constexpr const CovarianceSide& other() const { return is_y() ? forward.x : forward.y; }
  // Of equal widths; else W has no `other`.
  RIFT_BOTH constexpr bool near() const { return forward.x.width == forward.y.width; }

  __device__ float scalar(Scalar which) const { return forward.scalars[side * SCALARS + which]; }
  __device__ bool full() const { return scalar(FULL) != 0; }
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

// Per column, for the end: the means' share, and the rows' weighted sums.
struct BackwardColumn {
  float shift, weights;
};

__device__ inline BackwardColumn backward_column(const BackwardArguments& arguments, int column) {
  const CovarianceArguments& forward = arguments.forward;
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
  if (forward.debiased) {
    const float* sums = forward.weights + 2 * arguments.side * width + column;
    result.weights =
        arguments.scalar(ROW_OWN) * sums[0] + arguments.scalar(ROW_OTHER) * sums[width];
  }
  return result;
}

// The w of a row.
__device__ inline float backward_weight(const BackwardArguments& arguments, int row) {
  const CovarianceArguments& forward = arguments.forward;
  if (!forward.debiased) return 0;
  const float* own = forward.energies + arguments.side * forward.rows;
  const float* other = forward.energies + (1 - arguments.side) * forward.rows;
  return arguments.scalar(ROW) + arguments.scalar(ROW_OWN) * own[row] +
         arguments.scalar(ROW_OTHER) * other[row];
}

// Writes an element of the gradient, of which `sum` has come from products.
__device__ inline void store_gradient(const BackwardArguments& arguments, float g, int row,
                                      int column, float sum, float weight,
                                      const BackwardColumn& of_column) {
  const CovarianceSide& own = arguments.own();
  if (column >= own.width) return;
  const float inverse = arguments.scalar(INVERSE_OWN);
  float value = (sum - of_column.shift) * (inverse * arguments.scalar(SCALE)) *
                arguments.scalar(INVERSE_OTHER);
  if (arguments.forward.debiased) {
    const auto* features = static_cast<const Bf16*>(own.features);
    const float x =
        to_float(features[row * own.stride + column]) - arguments.means_of_own()[column];
    const float mean = of_column.weights * inverse / static_cast<float>(arguments.forward.rows);
    value += (weight * inverse * x - mean) * inverse;
  }
  arguments.grad[static_cast<long long>(row) * own.width + column] = round_to_bf16(value * g);
}

}  // namespace rift
