// The end of a tile of the gradient: what its kernels share. Sums of products become the gradient,
// which leaves in whole rows through shared memory.
#pragma once

#include "cka_large/backward.cuh"
#include "cka_large/moments_layout.h"

namespace rift {

// What all elements of a column or of a row have in common, for a tile.
template <int COLUMNS>
struct BackwardTerms {
  // What is added to scaled sums, and the means of Own.
  float constants[COLUMNS], means[COLUMNS];
  // Factors of centered features.
  float weights[BACKWARD_ROWS];
};

// Of the long rows: scaled, centered features, and V.
template <int COLUMNS>
struct BackwardLongRows {
  float features[MAX_LONG_ROWS][COLUMNS], weights[MAX_LONG_ROWS][BACKWARD_ROWS];
};

// A tile of the gradient. It takes the place of the features that it is made of: boxes of 64
// columns in shared memory, whose rows are swizzled as by the copy engine.
template <int COLUMNS>
struct BackwardTile {
  const BackwardArguments& arguments;
  BackwardTerms<COLUMNS>& terms;
  BackwardLongRows<COLUMNS>& long_rows;
  unsigned char* first_box;
  int next_box;  // bytes from one box to the next
  int row, column;

  // Computes the terms of columns by some threads, four columns at once.
  __device__ void compute_columns(int thread, int threads) const {
#pragma unroll 1
    for (int i = 4 * thread; i < COLUMNS && column + i < forward().width; i += 4 * threads) {
      const float* means = arguments.own_means() + column + i;
      *reinterpret_cast<Four*>(terms.constants + i) = four_constants(column + i);
      *reinterpret_cast<Four*>(terms.means + i) = load_floats<4>(means);
    }
  }

  __device__ void compute_rows(int thread, int threads) const {
#pragma unroll 1
    for (int i = thread; i < BACKWARD_ROWS && row + i < forward().rows; i += threads) {
      terms.weights[i] = weight(row + i);
    }
  }

  __device__ void compute_long_columns(int thread, int threads) const {
    const auto* features = static_cast<const Bf16*>(own().features);
#pragma unroll 1
    for (int s = 0; arguments.long_row(s) >= 0; ++s) {
      const long long offset = arguments.long_row(s) * own().stride + column;
#pragma unroll 1
      for (int i = thread; i < COLUMNS && column + i < own().width; i += threads) {
        const float x = to_float(features[offset + i]) - arguments.own_means()[column + i];
        long_rows.features[s][i] = x * arguments.scalar(INVERSE_OWN);
      }
    }
  }

  __device__ void compute_long_weights(int thread, int threads) const {
#pragma unroll 1
    for (int s = 0; arguments.long_row(s) >= 0; ++s) {
#pragma unroll 1
      for (int i = thread; i < BACKWARD_ROWS && row + i < forward().rows; i += threads) {
        long_rows.weights[s][i] = long_weight(s, row + i);
      }
    }
  }

  __device__ unsigned char* element(int tile_row, int tile_column) const {
    const int vector = tile_column / 8 % 8 ^ tile_row % 8;
    return first_box + tile_column / BOX_COLUMNS * next_box + tile_row * 128 + vector * 16 +
           tile_column % 8 * 2;
  }

  // Turns a warp's sums of products into the gradient, in DOWN x ACROSS matrices of 16 x 16. Eight
  // sums of each follow one another: as in multiply_add, of the left half and of the right half.
  template <int DOWN, int ACROSS>
  __device__ void finish(float* c, int first_row, int first_column) const {
    const int lane = threadIdx.x % 32, lane_row = first_row + lane / 4;
    const int lane_column = first_column + lane % 4 * 2;
    const float product_scale = arguments.product_scale();
#pragma unroll
    for (int down = 0; down < DOWN; ++down) {
      const float weights[2] = {terms.weights[lane_row + 16 * down],
                                terms.weights[lane_row + 16 * down + 8]};
#pragma unroll
      for (int across = 0; across < ACROSS; ++across) {
        uint32_t features[4];
        load_matrices(features, matrix_row(first_row + 16 * down, first_column + 16 * across));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column_of_pair = lane_column + 16 * across + 8 * half;
          const auto constants = load_floats<2>(terms.constants + column_of_pair);
          const auto means = load_floats<2>(terms.means + column_of_pair);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t pair = features[2 * half + i / 2];
            const float x = bits_to_float(i % 2 ? pair & 0xFFFF0000 : pair << 16);
            float& sum = c[(down * ACROSS + across) * 8 + 4 * half + i];
            sum = sum * product_scale + constants.elements[i % 2];
            sum += weights[i / 2] * (x - means.elements[i % 2]);
          }
        }
      }
    }
    for (int s = 0; arguments.long_row(s) >= 0; ++s) {
#pragma unroll
      for (int down = 0; down < DOWN; ++down) {
        const float* weights = long_rows.weights[s] + lane_row + 16 * down;
#pragma unroll
        for (int eighth = 0; eighth < 2 * ACROSS; ++eighth) {
          const auto features = load_floats<2>(long_rows.features[s] + lane_column + 8 * eighth);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c[(down * ACROSS * 2 + eighth) * 4 + i] +=
                weights[i / 2 * 8] * features.elements[i % 2];
          }
        }
      }
    }
    const float gradient_scale = arguments.gradient_scale();
#pragma unroll
    for (int down = 0; down < DOWN; ++down) {
#pragma unroll
      for (int across = 0; across < ACROSS; ++across) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* sums = c + (down * ACROSS + across) * 8 + 2 * i;
          pairs[i] = round_to_bf16_pair(sums[0] * gradient_scale, sums[1] * gradient_scale);
        }
        store_matrices(pairs, matrix_row(first_row + 16 * down, first_column + 16 * across));
      }
    }
  }

  // Writes 16 rows by a warp, in vectors to whose size the rows are aligned.
  __device__ void store(int first_row) const {
    const int width = own().width;
    if (width % 8 == 0) {
      store_vectors<8>(first_row);
    } else if (width % 4 == 0) {
      store_vectors<4>(first_row);
    } else if (width % 2 == 0) {
      store_vectors<2>(first_row);
    } else {
      store_vectors<1>(first_row);
    }
  }

 private:
  using Four = Vector<float, 4>;

  __device__ const CkaLargeArguments& forward() const { return arguments.forward; }
  __device__ const CkaLargeSide& own() const { return arguments.own_side(); }

  // The contribution of the means of Other, and m, for four columns.
  __device__ Four four_constants(int grad_column) const {
    const int width = forward().width;
    const float* shifts = (arguments.is_y() ? forward().shift_y : forward().shift_x) + grad_column;
    const int parts = arguments.is_y() ? ceil_div(forward().x.width, STRIP)
                                       : ceil_div(forward().y.width, MOMENT_BLOCK);
    const float* low_shifts = shifts + static_cast<long long>(width / STRIP) * width;
    const bool uses_low_halves = arguments.uses_low_halves();
    Four sum = {};
#pragma unroll 2
    for (int part = 0; part < parts; ++part) {
      const Four high = load_floats<4>(shifts + part * width);
      const Four low = uses_low_halves ? load_floats<4>(low_shifts + part * width) : Four{};
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.elements[k] += high.elements[k] + low.elements[k];
    }
    Four result;
#pragma unroll
    for (int k = 0; k < 4; ++k) result.elements[k] = -sum.elements[k] * arguments.product_scale();
    if (!forward().debiased) return result;
    const float* sums = forward().weighted_sums + 2 * arguments.side * width + grad_column;
    const Four own_sums = load_floats<4>(sums), other_sums = load_floats<4>(sums + width);
    const float scale = arguments.scalar(INVERSE_OWN) / static_cast<float>(forward().rows - 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      result.elements[k] -=
          arguments.combined(own_sums.elements[k], other_sums.elements[k]) * scale;
    }
    return result;
  }

  // w, as a factor of features that are centered but not scaled.
  __device__ float weight(int grad_row) const {
    if (!forward().debiased) return 0;
#pragma unroll 1
    for (int s = 0; arguments.long_row(s) >= 0; ++s) {
      if (arguments.long_row(s) == grad_row) return 0;
    }
    const RowTerms terms = forward().row_terms[grad_row];
    return (2 * arguments.row_offset(terms) - arguments.combined(terms.energies) -
            arguments.scalar(ROW_TOTAL)) *
           arguments.scalar(INVERSE_OWN);
  }

  // An element of V.
  __device__ float long_weight(int s, int grad_row) const {
    const int long_row = arguments.long_row(s);
    if (long_row == grad_row) return 0;
    const float* products =
        forward().row_products + static_cast<long long>(grad_row) * (2 * MAX_LONG_ROWS) + s;
    return arguments.combined({products[0], products[MAX_LONG_ROWS]}) -
           arguments.row_offset(forward().row_terms[grad_row]) -
           arguments.row_offset(forward().row_terms[long_row]) + arguments.scalar(ROW_TOTAL);
  }

  // The row of a 16 x 16 matrix whose address this lane passes to ldmatrix or stmatrix.
  __device__ unsigned char* matrix_row(int tile_row, int tile_column) const {
    return element(tile_row + threadIdx.x % 16, tile_column + threadIdx.x % 32 / 16 * 8);
  }

  template <int SIZE>
  __device__ void store_vectors(int first_row) const {
    using Elements = Vector<uint16_t, SIZE>;
    const int rows = forward().rows, width = own().width;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < 16 * COLUMNS / SIZE; i += 32) {
      const int tile_row = first_row + i / (COLUMNS / SIZE);
      const int tile_column = i % (COLUMNS / SIZE) * SIZE;
      if (row + tile_row >= rows || column + tile_column >= width) continue;
      unsigned short* out = arguments.grad + static_cast<long long>(row + tile_row) * width;
      *reinterpret_cast<Elements*>(out + column + tile_column) =
          *reinterpret_cast<const Elements*>(element(tile_row, tile_column));
    }
  }
};

}  // namespace rift
