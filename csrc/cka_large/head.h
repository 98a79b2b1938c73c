// Linear CKA in covariance form, from sums over its blocks and rows, and the scalars of its gradient:
//
//   value  = H(X, Y) / sqrt(H(X, X) H(Y, Y))
//   grad_X = scale (W A + Y F) [+ w * X + V S - g],   W = t Y - u X,  F = C^T - t A
//
// of features of unit norm; t is the regression of Y on X, so that both terms are small where the
// student is near its teacher. Biased, H(X, Y) = ||C||^2. Debiased, with K = X X^T, L = Y Y^T, k_i and
// l_i the sums of their rows without the diagonal, S the long rows, and moments of all others, R:
//
//   H(X, Y) = sum_{i != j} K_ij L_ij + (sum k)(sum l) / ((n - 1)(n - 2)) - 2 / (n - 2) sum_i k_i l_i
//   sum_{i != j} K_ij L_ij = ||C||^2 - sum_R K_ii L_ii + sum_{i != j, i or j in S} K_ij L_ij
//
// so that no difference has a term of a long row's with itself. The gradient has, beside the products,
// what U-centered K and L have of columns of S (V), less the diagonal of R (w), and the part that is the
// same for all rows (g): see backward.cuh.
#pragma once

#include <cmath>

#include "cka_large/layout.h"

namespace rift {

struct CkaLargeSums {
  double blocks[HEAD_SUMS];
  double rows[ROW_SUMS];
  double pivot_energy_x, pivot_energy_y;  // energies about the pivot
  double long_x, long_y;                  // energies of S
};

// Debiased, of one pair of sides.
RIFT_HOST_DEVICE inline double debiased_hsic(double square, double pairs, double k, double l,
                                             double kl, double n) {
  return square + pairs + k * l / ((n - 1) * (n - 2)) - 2 / (n - 2) * kl;
}

// Writes [2][SCALARS]; returns the value. `t` is 0 where the widths differ.
RIFT_HOST_DEVICE inline float cka_large_head(const CkaLargeSums& sums, double n, float inverse_x,
                                             float inverse_y, float t, bool debiased, bool distance,
                                             bool high, float* scalars) {
  double square_a = sums.blocks[SQUARE_A], square_b = sums.blocks[SQUARE_B];
  double square_c = sums.blocks[SQUARE_C];
  bool degenerate = sums.pivot_energy_x == 0 || sums.pivot_energy_y == 0;
  const double* rows = sums.rows;
  const double sums_of[2] = {rows[SUM_K], rows[SUM_L]};
  if (debiased) {
    // What differs from its mean by less than this has no moments but what rounding leaves.
    const double constant_rounding = n / (1LL << 40);
    const bool constant_x = rows[REST_X] <= rows[MEAN_X] * constant_rounding;
    const bool constant_y = rows[REST_Y] <= rows[MEAN_Y] * constant_rounding;
    if (constant_x) square_a = 0;
    if (constant_y) square_b = 0;
    if (constant_x || constant_y) square_c = 0;
  }
  double hxx = square_a, hyy = square_b, h = square_c;
  if (debiased) {
    hxx = debiased_hsic(hxx, rows[PAIRS_XX], sums_of[0], sums_of[0], rows[SQUARE_K], n);
    hyy = debiased_hsic(hyy, rows[PAIRS_YY], sums_of[1], sums_of[1], rows[SQUARE_L], n);
    h = debiased_hsic(h, rows[PAIRS_XY], sums_of[0], sums_of[1], rows[PRODUCT_KL], n);
    // What long rows add is never taken off again. It is made of the mean's rounding where all other
    // rows are alike, and all but one of these.
    const double rounding = 1.0 / (1 << 19), mean_rounding = n / (1LL << 42);
    degenerate = degenerate || hxx <= square_a * rounding || hyy <= square_b * rounding;
    degenerate = degenerate || hxx <= rows[MEAN_X] * sums.long_x * mean_rounding ||
                 hyy <= rows[MEAN_Y] * sums.long_y * mean_rounding;
  }
  double beta = degenerate ? 0 : 2 / sqrt(hxx * hyy);
  double value = 0.5 * h * beta;
  // NaN and Inf in the features come through where nothing varies, too.
  value +=
      (sums.pivot_energy_x - sums.pivot_energy_x) + (sums.pivot_energy_y - sums.pivot_energy_y);
  if (n < (debiased ? 4 : 2)) value = NAN;
  beta += value - value;
  // Where the terms are not small, their rounded halves are.
  const double left = (1 - value) * (h > square_c ? h : square_c);
  const bool full[2] = {sums.blocks[SQUARE_FX] > left && high,
                        sums.blocks[SQUARE_FY] > left && high};
  if (distance) {
    value = 1 - value;
    beta = -beta;
  }
  const double u[2] = {degenerate ? 0 : h / hxx, degenerate ? 0 : h / hyy};
  const double b = 1 / ((n - 1) * (n - 2));
  const float inverse[2] = {inverse_x, inverse_y};
  for (int side = 0; side < 2; ++side) {
    const double alpha = -u[side] * beta;
    float* out = scalars + side * SCALARS;
    out[SCALE] = static_cast<float>(beta);
    out[OWN] = static_cast<float>(-u[side] * inverse[side] / inverse[1 - side]);
    out[OTHER] = t;
    out[LOW_HALVES] = full[side] ? 1 : 0;
    out[ROW] = static_cast<float>(b * (alpha * sums_of[side] + beta * sums_of[1 - side]));
    out[ROW_OWN] = static_cast<float>(alpha);
    out[ROW_OTHER] = static_cast<float>(beta);
    // Apart from the rest, because their product may not be a float32.
    out[INVERSE_OWN] = inverse[side];
    out[INVERSE_OTHER] = inverse[1 - side];
  }
  return static_cast<float>(value);
}

}  // namespace rift
