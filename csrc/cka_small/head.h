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

#include "common/symmetric_tiles.h"

namespace rift {

struct CkaSums {
  double xx, yy, xy;     // inner products
  float peak_x, peak_y;  // the largest diagonal element before U-centering
  // Energies of the features about their first valid row: exactly 0 if no column varies.
  float pivot_energy_x, pivot_energy_y;
};

struct CkaResult {
  float value, own_x, own_y, other;
};

// The offset s_i of row i. U-centering subtracts s_i + s_j from K_ij, so that the rows without the
// diagonal sum to 0.
RIFT_HOST_DEVICE inline float u_center_offset(float row_sum, float total, float n) {
  return (row_sum - total / (2 * (n - 1))) / (n - 2);
}

RIFT_HOST_DEVICE inline CkaResult cka_head(const CkaSums& sums, int n, bool debiased,
                                           bool distance) {
  // If a side does not vary, the similarity and its gradient are 0.
  bool degenerate = sums.pivot_energy_x == 0 || sums.pivot_energy_y == 0;
  if (debiased) {
    // A norm below this fraction of the longest row's energy consists of rounding errors.
    const double noise = 4.0 / (1 << 23);
    degenerate =
        degenerate || sqrt(sums.xx) <= sums.peak_x * noise || sqrt(sums.yy) <= sums.peak_y * noise;
  }
  double other = degenerate ? 0.0 : 2 / sqrt(sums.xx * sums.yy);
  double value = 0.5 * sums.xy * other;
  // Propagates NaN and Inf in the features, even where nothing varies.
  value +=
      (sums.pivot_energy_x - sums.pivot_energy_x) + (sums.pivot_energy_y - sums.pivot_energy_y);
  if (n < (debiased ? 4 : 2)) value = NAN;
  other += value - value;
  double own_x = degenerate ? 0.0 : -2 * value / sums.xx,
         own_y = degenerate ? 0.0 : -2 * value / sums.yy;
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
