// One side's gradient of linear CKA in covariance form: what its kernels share.
//
//   grad = incoming * (scale * (W P + Other R) [+ w * Own + V S - m])
//   W    = c_own Own + c_other Other
//
// Own and Other are the centered features of this side and the other one. P and R are given as two
// bfloat16 each (the planes of cka_large_head). W is formed in float32. Other is multiplied without
// centering, and the contribution of its means, which is the same for all rows, is subtracted at
// the end. Low halves are multiplied if the scalars say so.
//
// Debiased, each row has a weight w, 0 for a long row, and coefficients V of the long rows, S: the
// elements of U-centered alpha K + beta L in their columns, without the diagonal. m is the sum of
// all rows but the long ones, each weighted with its offset in U-centering.
#pragma once

#include "cka_large/layout.h"
#include "common/elements.cuh"

namespace rift {

constexpr int BACKWARD_ROWS = 128;

struct BackwardArguments {
  CkaLargeArguments forward;
  const float* incoming;
  unsigned short* grad;  // (rows, width) contiguous
  int side;              // 0: X, 1: Y

  RIFT_HOST_DEVICE constexpr bool is_y() const { return side == 1; }
  RIFT_HOST_DEVICE constexpr const CkaLargeSide& own_side() const {
    return is_y() ? forward.y : forward.x;
  }
  RIFT_HOST_DEVICE constexpr const CkaLargeSide& other_side() const {
    return is_y() ? forward.x : forward.y;
  }
  // If the widths differ, W has no term of Other.
  RIFT_HOST_DEVICE constexpr bool equal_widths() const {
    return forward.x.width == forward.y.width;
  }

  __device__ float scalar(Scalar which) const { return forward.scalars[side * SCALARS + which]; }
  __device__ float w_other() const { return equal_widths() ? scalar(W_OTHER) : 0; }
  __device__ bool uses_low_halves() const { return scalar(USES_LOW_HALVES) != 0; }
  // The factors of sums of products, and of the result. Their product may exceed float32's range.
  __device__ float product_scale() const { return scalar(SCALE) * scalar(INVERSE_OTHER); }
  __device__ float gradient_scale() const { return scalar(INVERSE_OWN) * *incoming; }
  // Element of alpha K + beta L, or a sum of elements, from those of K and L.
  __device__ float combined(float own, float other) const {
    return scalar(ROW_OWN) * own + scalar(ROW_OTHER) * other;
  }
  __device__ float combined(const float (&pair)[2]) const {
    return side ? combined(pair[1], pair[0]) : combined(pair[0], pair[1]);
  }
  // The offset of a row in U-centering of alpha K + beta L.
  __device__ float row_offset(const RowTerms& terms) const {
    return combined(terms.sums) / static_cast<float>(forward.rows - 2);
  }
  // The long row with this index, or -1.
  __device__ int long_row(int s) const {
    return forward.debiased && s < MAX_LONG_ROWS ? forward.long_rows[s] : -1;
  }
  __device__ const float* own_means() const { return forward.means + side * forward.width; }
  // Those that W needs. If the widths differ, any will do: c_other is 0.
  __device__ const float* other_means() const {
    return forward.means + (equal_widths() ? 1 - side : side) * forward.width;
  }
};

// A range of the inner dimension that is multiplied at once.
struct BackwardStep {
  bool is_own;  // W P, else Other R
  int pass;     // 0: high times high halves, 1: high times low, 2: low times high
  int inner;    // first element of the range

  // Its first row in the planes: the high halves of P and R come before the low ones.
  RIFT_HOST_DEVICE constexpr int plane_row(int width) const {
    return (pass == 1 ? 2 * width : 0) + (is_own ? 0 : width) + inner;
  }
};

// The steps of a tile in order, the same for producers and consumers.
struct BackwardSteps {
  int size, own_steps, other_steps, own_passes, other_passes;

  RIFT_HOST_DEVICE constexpr int own_count() const { return own_steps * own_passes; }
  RIFT_HOST_DEVICE constexpr int count() const { return own_count() + other_steps * other_passes; }

  RIFT_HOST_DEVICE constexpr BackwardStep at(int step) const {
    const bool is_own = step < own_count();
    const int index = is_own ? step : step - own_count();
    const int steps = is_own ? own_steps : other_steps;
    const int pass = (index >= steps) + (index >= 2 * steps);
    return {is_own, pass, (index - pass * steps) * size};
  }
};

__device__ inline BackwardSteps backward_steps(const BackwardArguments& arguments, int size) {
  const bool uses_low_halves = arguments.uses_low_halves();
  return {size, ceil_div(arguments.own_side().width, size),
          ceil_div(arguments.other_side().width, size), uses_low_halves ? 3 : 1,
          uses_low_halves ? 2 : 1};
}

// The high or low halves of two adjacent elements of W, from features and from what the means
// contribute. Near the teacher, Own and Other nearly cancel, so that only one sum is rounded much.
template <bool LOW>
__device__ inline uint32_t form_pair(uint32_t own, uint32_t other, float c_own, float c_other,
                                     Vector<float, 2> constants) {
  const float first = (constants.elements[0] + c_other * bits_to_float(other << 16)) +
                      c_own * bits_to_float(own << 16);
  const float second = (constants.elements[1] + c_other * bits_to_float(other & 0xFFFF0000)) +
                       c_own * bits_to_float(own & 0xFFFF0000);
  uint32_t high, low;
  split_pair(first, second, high, low);
  return LOW ? low : high;
}

template <int SIZE>
__device__ inline Vector<float, SIZE> load_floats(const float* first) {
  return *reinterpret_cast<const Vector<float, SIZE>*>(first);
}

}  // namespace rift
