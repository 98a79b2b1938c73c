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
//   sum_{i != j} K_ij L_ij = ||C||^2 - sum_R K_ii L_ii + 2 sum_S x^T C y + sum_{S, i != j} K_ij L_ij
//
// and the gradient has, beside the products, what U-centered K and L have of columns of S (V), less the
// diagonal of R (w), and the part that is the same for all rows (g): see backward.cuh.
#pragma once

#include <cmath>

#include "covariance_layout.h"

namespace rift {

struct CovarianceSums {
  double blocks[HEAD_SUMS];
  double rows[ROW_SUMS];
  double varies_x, varies_y;  // energies about the first row
  int longest;                // rows of S
};

// Debiased, of one pair of sides.
RIFT_BOTH inline double debiased_hsic(double square, double with_long, double pairs, double k,
                                      double l, double kl, double n) {
  return square + 2 * with_long + pairs + k * l / ((n - 1) * (n - 2)) - 2 / (n - 2) * kl;
}

// Writes [2][SCALARS]; returns the value. `t` is 0 where the widths differ.
RIFT_BOTH inline float covariance_head(const CovarianceSums& sums, double n, float inverse_x,
                                       float inverse_y, float t, bool debiased, bool distance,
                                       bool high, float* scalars) {
  const double square_c = sums.blocks[SQUARE_C];
  double hxx = sums.blocks[SQUARE_A], hyy = sums.blocks[SQUARE_B], h = square_c;
  bool dead = sums.varies_x == 0 || sums.varies_y == 0;
  const double* rows = sums.rows;
  const double sums_of[2] = {rows[SUM_K], rows[SUM_L]};
  if (debiased) {
    hxx = debiased_hsic(hxx, sums.blocks[LONG_A], rows[PAIRS_XX], sums_of[0], sums_of[0],
                        rows[SQUARE_K], n);
    hyy = debiased_hsic(hyy, sums.blocks[LONG_B], rows[PAIRS_YY], sums_of[1], sums_of[1],
                        rows[SQUARE_L], n);
    h = debiased_hsic(h, sums.blocks[LONG_C], rows[PAIRS_XY], sums_of[0], sums_of[1],
                      rows[PRODUCT_KL], n);
    // What is left by less than this is made of rounding; and so is the rest where it is nothing beside
    // its mean, which leaves no pair of rows that differ from it.
    const double rounding = 1.0 / (1 << 19), mean_rounding = 1.0 / (1LL << 40);
    dead = dead || hxx <= (sums.blocks[SQUARE_A] + 2 * sums.blocks[LONG_A]) * rounding ||
           hyy <= (sums.blocks[SQUARE_B] + 2 * sums.blocks[LONG_B]) * rounding;
    dead = dead || (sums.longest == 1 && (rows[REST_X] <= n * rows[MEAN_X] * mean_rounding ||
                                          rows[REST_Y] <= n * rows[MEAN_Y] * mean_rounding));
  }
  double beta = dead ? 0 : 2 / sqrt(hxx * hyy);
  double value = 0.5 * h * beta;
  // NaN and Inf in the features come through where nothing varies, too.
  value += (sums.varies_x - sums.varies_x) + (sums.varies_y - sums.varies_y);
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
  const double u[2] = {dead ? 0 : h / hxx, dead ? 0 : h / hyy};
  const double b = 1 / ((n - 1) * (n - 2));
  const float inverse[2] = {inverse_x, inverse_y};
  for (int side = 0; side < 2; ++side) {
    const double alpha = -u[side] * beta;
    float* out = scalars + side * SCALARS;
    out[SCALE] = static_cast<float>(beta);
    out[OWN] = static_cast<float>(-u[side] * inverse[side] / inverse[1 - side]);
    out[OTHER] = t;
    out[FULL] = full[side] ? 1 : 0;
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
