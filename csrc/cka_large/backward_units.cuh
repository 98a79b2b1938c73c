// The work of backward_sm90 in units, which clusters take in turns. A unit is a pair of tiles with
// the same columns. If at most half of all clusters would have a pair in the last round, its pairs
// are cut in two: of each tile, only the first warpgroup computes its 64 rows.
#pragma once

#include "cka_large/backward.cuh"

namespace rift {

constexpr int BACKWARD_COLUMNS = CLUSTER_SIZE * MOMENT_BLOCK;

struct BackwardUnits {
  int clusters;
  int whole;  // pairs that are not cut
  int count;

  RIFT_HOST_DEVICE constexpr int pair(int unit) const {
    return is_half(unit) ? whole + (unit - whole) / 2 : unit;
  }
  RIFT_HOST_DEVICE constexpr bool is_half(int unit) const { return unit >= whole; }
};

RIFT_HOST_DEVICE constexpr BackwardUnits backward_units(const CkaLargeArguments& forward,
                                                        int side) {
  const int width = side == 0 ? forward.x.width : forward.y.width;
  const int pairs =
      ceil_div(forward.rows, CLUSTER_SIZE * BACKWARD_ROWS) * ceil_div(width, BACKWARD_COLUMNS);
  const int clusters = forward.schedule.programs, last_round = pairs % clusters;
  const bool is_cut = 2 * last_round <= clusters;
  const int whole = is_cut ? pairs - last_round : pairs, count = 2 * pairs - whole;
  return {count < clusters ? count : clusters, whole, count};
}

}  // namespace rift
