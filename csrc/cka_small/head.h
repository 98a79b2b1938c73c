// Linear CKA from sums over two Gram matrices, and the coefficients of its gradient:
//
//   value  = <Kx, Ky> / (||Kx|| ||Ky||)             grad_X = (own_x Kx + other Ky) Xc
//   own_x  = -2 value / ||Kx||^2                    grad_Y = (own_y Ky + other Kx) Yc
//   other  = 2 / (||Kx|| ||Ky||)
//
// Kx and Ky are Gram matrices of features scaled to unit norm; they are centered or, if debiased,
// U-centered.
#pragma once

#include <cmath>

#include "common/primitives.cuh"

namespace rift {

struct CkaSums {
  double xx, yy, xy;       // inner products
  float peak_x, peak_y;    // the largest diagonal element before U-centering
  float trace_x, trace_y;  // before scaling: exactly 0 if no column varies
};

struct CkaResult {
  float value, own_x, own_y, other;
};

// How the elements of a Gram matrix are scaled and, if debiased, U-centered: K_ij becomes
// scale K_ij - offset(r_i) - offset(r_j), where r is a row's sum without the diagonal. The rows
// without the diagonal then sum to 0.
struct UCentering {
  float scale, factor, shift;

  __device__ float offset(float row_sum) const { return row_sum * factor - shift; }
};

// What n rows make of it; zeros leave the matrix as it is.
struct UCenteringFactors {
  float of_row, of_total;

  __device__ UCenteringFactors(int n, bool debiased)
      : of_row(debiased ? 1 / static_cast<float>(n - 2) : 0),
        of_total(debiased ? of_row / static_cast<float>(2 * (n - 1)) : 0) {}

  // `total`: of the rows' sums.
  __device__ UCentering centering(float scale, float total) const {
    return {scale, scale * of_row, scale * total * of_total};
  }
};

// 1 / sqrt(x) in float64, by a step of Newton's method: slow divisions would make all threads wait.
__device__ inline double inverse_sqrt(double x) {
  const double guess = rsqrtf(static_cast<float>(x));
  return guess * (1.5 - 0.5 * x * guess * guess);
}

__device__ inline CkaResult cka_head(const CkaSums& sums, int n, bool debiased,
                                           bool distance) {
  // If a side does not vary, the similarity and its gradient are 0.
  bool degenerate = sums.trace_x == 0 || sums.trace_y == 0;
  if (debiased) {
    // A norm below this fraction of the longest row's energy consists of rounding errors.
    const double noise = 4.0 / (1 << 23);
    const double floor_x = sums.peak_x * noise, floor_y = sums.peak_y * noise;
    degenerate = degenerate || sums.xx <= floor_x * floor_x || sums.yy <= floor_y * floor_y;
  }
  const double inverse_x = degenerate ? 0.0 : inverse_sqrt(sums.xx),
               inverse_y = degenerate ? 0.0 : inverse_sqrt(sums.yy);
  double other = 2 * inverse_x * inverse_y;
  double value = 0.5 * sums.xy * other;
  // Propagates NaN and Inf in the features, even where nothing varies.
  value += (sums.trace_x - sums.trace_x) + (sums.trace_y - sums.trace_y);
  if (n < (debiased ? 4 : 2)) value = NAN;
  other += value - value;
  double own_x = -2 * value * inverse_x * inverse_x, own_y = -2 * value * inverse_y * inverse_y;
  if (distance) {
    value = 1 - value;
    own_x = -own_x;
    own_y = -own_y;
    other = -other;
  }
  return {static_cast<float>(value), static_cast<float>(own_x), static_cast<float>(own_y),
          static_cast<float>(other)};
}

}  // namespace rift
