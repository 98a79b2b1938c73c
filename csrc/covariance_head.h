// Linear CKA in covariance form, from sums over its blocks and rows, and the scalars of its gradient:
//
//   value  = H(X, Y) / sqrt(H(X, X) H(Y, Y)),  H(X, Y) = ||C||^2 [+ b (sum r)(sum q) - a sum r q]
//   grad_X = scale (W A + Y F) + w * X,        W = t Y - u X,  F = C^T - t A,  w affine in r and q
//
// of features of unit norm; t is the regression of Y on X, so that both terms are small where the
// student is near its teacher. A side's `scalars` are what backward_sm90 needs of that.
#pragma once

#include <cmath>

#include "covariance_layout.h"

namespace rift {

struct CovarianceSums {
  double blocks[HEAD_SUMS];
  double rows[ROW_SUMS];
  double varies_x, varies_y;  // energies about the first row
};

// Writes [2][SCALARS]; returns the value. `t` is 0 where the widths differ.
RIFT_BOTH inline float covariance_head(const CovarianceSums& sums, double n, float inverse_x,
                                       float inverse_y, float t, bool debiased, bool distance,
                                       bool high, float* scalars) {
  const double square_c = sums.blocks[SQUARE_C];
  double hxx = sums.blocks[SQUARE_A], hyy = sums.blocks[SQUARE_B], h = square_c;
  bool dead = sums.varies_x == 0 || sums.varies_y == 0;
  double a = 0, b = 0;
  const double sum_r = sums.rows[SUM_R], sum_q = sums.rows[SUM_Q];
  if (debiased) {
    a = n / (n - 2);
    b = 1 / ((n - 1) * (n - 2));
    hxx += b * sum_r * sum_r - a * sums.rows[SQUARE_R];
    hyy += b * sum_q * sum_q - a * sums.rows[SQUARE_Q];
    h += b * sum_r * sum_q - a * sums.rows[PRODUCT_RQ];
    // What is left of a unit block by less than this is made of rounding.
    const double rounding = 1.0 / (1 << 19);
    dead = dead || hxx <= sums.blocks[SQUARE_A] * rounding ||
           hyy <= sums.blocks[SQUARE_B] * rounding;
  }
  double beta = dead ? 0 : 2 / sqrt(hxx * hyy);
  double value = 0.5 * h * beta;
  // NaN and Inf in the features come through where nothing varies, too.
  value += (sums.varies_x - sums.varies_x) + (sums.varies_y - sums.varies_y);
  if (n < (debiased ? 4 : 2)) value = NAN;
  beta += value - value;
  // Where the terms are not small, their rounded halves are.
  const double left = (1 - value) * square_c;
  const bool full[2] = {sums.blocks[SQUARE_FX] > left && high,
                        sums.blocks[SQUARE_FY] > left && high};
  if (distance) {
    value = 1 - value;
    beta = -beta;
  }
  const double u[2] = {dead ? 0 : h / hxx, dead ? 0 : h / hyy};
  const double own_sum[2] = {sum_r, sum_q};
  const float inverse[2] = {inverse_x, inverse_y};
  for (int side = 0; side < 2; ++side) {
    const double alpha = -u[side] * beta;
    float* out = scalars + side * SCALARS;
    out[SCALE] = static_cast<float>(beta);
    out[OWN] = static_cast<float>(-u[side] * inverse[side] / inverse[1 - side]);
    out[OTHER] = t;
    out[FULL] = full[side] ? 1 : 0;
    out[ROW] = static_cast<float>(b * (alpha * own_sum[side] + beta * own_sum[1 - side]));
    out[ROW_OWN] = static_cast<float>(-a * alpha);
    out[ROW_OTHER] = static_cast<float>(-a * beta);
    // Apart from the rest, because their product may not be a float32.
    out[INVERSE_OWN] = inverse[side];
    out[INVERSE_OTHER] = inverse[1 - side];
  }
  return static_cast<float>(value);
}

}  // namespace rift
