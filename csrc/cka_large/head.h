// Linear CKA in covariance form from sums over moments and rows, and the scalars of its gradient:
//
//   value  = H(X, Y) / sqrt(H(X, X) H(Y, Y))
//   grad_X = scale (W A + Y F) [+ w * X + V S - m],   W = t Y - u X,  F = C^T - t A
//
// Features are scaled to unit norm; A = X^T X, B = Y^T Y and C = X^T Y are their second moments. t
// is the regression coefficient of Y on X, so that both terms are small if the student is near its
// teacher. Biased, H(X, Y) = ||C||^2.
//
// Debiased, let K = X X^T and L = Y Y^T, and let k_i and l_i be the sums of their rows without the
// diagonal. S are the long rows (longest.cuh), R all others; the moments are those of R:
//
//   H(X, Y) = sum_{i != j} K_ij L_ij
//             + (sum k)(sum l) / ((n - 1)(n - 2)) - 2 / (n - 2) sum_i k_i l_i
//   sum_{i != j} K_ij L_ij
//           = ||C||^2 - sum_R K_ii L_ii + sum_{i != j, i or j in S} K_ij L_ij
//
// So no difference contains the product of a long row with itself. Besides the products, the
// gradient contains the columns of S in U-centered K and L (V). It also contains minus the diagonal
// of R (w) and a term that is the same for all rows (m); see backward.cuh.
#pragma once

#include <cmath>

#include "cka_large/layout.h"

namespace rift {

struct CkaLargeSums {
  double elements[HEAD_SUMS];
  double rows[ROW_SUMS];
  double pivot_energy_x, pivot_energy_y;  // exactly 0 if no column varies; see layout.h
  double long_x, long_y;                  // energies of S
};

// Debiased H of a pair of sides.
RIFT_HOST_DEVICE inline double debiased_hsic(double square, double pairs, double k, double l,
                                             double kl, double n) {
  return square + pairs + k * l / ((n - 1) * (n - 2)) - 2 / (n - 2) * kl;
}

// Writes `scalars`, [2][SCALARS], and returns the value. `t` is 0 if the widths differ.
RIFT_HOST_DEVICE inline float cka_large_head(const CkaLargeSums& sums, double n, float inverse_x,
                                             float inverse_y, float t, bool debiased, bool distance,
                                             bool may_use_low_halves, float* scalars) {
  double square_a = sums.elements[SQUARE_A], square_b = sums.elements[SQUARE_B];
  double square_c = sums.elements[SQUARE_C];
  // If a side does not vary, the similarity and its gradient are 0.
  bool degenerate = sums.pivot_energy_x == 0 || sums.pivot_energy_y == 0;
  const double* rows = sums.rows;
  const double row_sums[2] = {rows[SUM_K], rows[SUM_L]};
  if (debiased) {
    // If all of R differ this little from their mean, their moments are rounding errors.
    const double constant_rounding = n / (1LL << 40);
    const bool constant_x = rows[REST_X] <= rows[MEAN_X] * constant_rounding;
    const bool constant_y = rows[REST_Y] <= rows[MEAN_Y] * constant_rounding;
    if (constant_x) square_a = 0;
    if (constant_y) square_b = 0;
    if (constant_x || constant_y) square_c = 0;
  }
  double hxx = square_a, hyy = square_b, h = square_c;
  if (debiased) {
    hxx = debiased_hsic(hxx, rows[PAIRS_XX], row_sums[0], row_sums[0], rows[SQUARE_K], n);
    hyy = debiased_hsic(hyy, rows[PAIRS_YY], row_sums[1], row_sums[1], rows[SQUARE_L], n);
    h = debiased_hsic(h, rows[PAIRS_XY], row_sums[0], row_sums[1], rows[PRODUCT_KL], n);
    // The terms of long rows never cancel. But if all rows are equal except for a single long one,
    // these terms are rounding errors of the mean.
    const double rounding = 1.0 / (1 << 19), mean_rounding = n / (1LL << 42);
    degenerate = degenerate || hxx <= square_a * rounding || hyy <= square_b * rounding;
    degenerate = degenerate || hxx <= rows[MEAN_X] * sums.long_x * mean_rounding ||
                 hyy <= rows[MEAN_Y] * sums.long_y * mean_rounding;
  }
  double beta = degenerate ? 0 : 2 / sqrt(hxx * hyy);
  double value = 0.5 * h * beta;
  // Propagates NaN and Inf in the features, even where nothing varies.
  value +=
      (sums.pivot_energy_x - sums.pivot_energy_x) + (sums.pivot_energy_y - sums.pivot_energy_y);
  if (n < (debiased ? 4 : 2)) value = NAN;
  beta += value - value;
  // The low halves matter unless F is small, as it is where the student is near its teacher.
  const double gap = (1 - value) * (h > square_c ? h : square_c);
  const bool uses_low_halves[2] = {sums.elements[SQUARE_FX] > gap && may_use_low_halves,
                                   sums.elements[SQUARE_FY] > gap && may_use_low_halves};
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
    out[W_OWN] = static_cast<float>(-u[side] * inverse[side] / inverse[1 - side]);
    out[W_OTHER] = t;
    out[USES_LOW_HALVES] = uses_low_halves[side] ? 1 : 0;
    out[ROW_TOTAL] = static_cast<float>(b * (alpha * row_sums[side] + beta * row_sums[1 - side]));
    out[ROW_OWN] = static_cast<float>(alpha);
    out[ROW_OTHER] = static_cast<float>(beta);
    // Stored separately, because their product may exceed the range of float32.
    out[INVERSE_OWN] = inverse[side];
    out[INVERSE_OTHER] = inverse[1 - side];
  }
  return static_cast<float>(value);
}

}  // namespace rift
