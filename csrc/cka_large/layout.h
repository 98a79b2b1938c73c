// Arguments of the launches that compute linear CKA of many rows, in covariance form:
//
//   statistics, means, [longest, row_terms], moments_sm80 or _sm90, cka_large_head,
//   backward_sm80 or _sm90
#pragma once

#include "cka_large/moments_layout.h"

namespace rift {

// bfloat16 features: rows are contiguous, begin at multiples of 16 bytes, and are all valid.
struct CkaLargeSide {
  const void* features;
  long long stride;
  int width;
};

// Columns that a block of `statistics` owns.
constexpr int STATISTICS_COLUMNS = 128;
// Rows of a tile that a block of `cka_large_head` owns.
constexpr int STRIP = 32;
constexpr int STRIPS = MOMENT_BLOCK / STRIP;
// Debiased, a row with more than LONG_SHARE times the mean energy is long. Below ALWAYS_LONG_BELOW
// rows, the MAX_LONG_ROWS longest are long, whatever their energy; see longest.cuh.
constexpr float LONG_SHARE = 4;
constexpr int ALWAYS_LONG_BELOW = 64;

// Scales of X and Y to unit norm, and the regression coefficient of the scaled sides, 0 if their
// widths differ.
struct UnitScales {
  float x, y, t;
};

// Sums over all elements, computed by `statistics`. An energy is a sum of squares.
enum Statistic {
  // Of differences from the pivots of columns (statistics.cuh): exactly 0 if no column varies.
  PIVOT_ENERGY_X,
  PIVOT_ENERGY_Y,
  ENERGY_X,  // of differences from the means of columns in a segment of rows
  ENERGY_Y,
  ENERGY_XY,  // the inner product of these differences of X and Y
  STATISTICS
};
// Sums of squares that blocks of `cka_large_head` leave to the last one; see head.h.
enum HeadSum { SQUARE_A, SQUARE_B, SQUARE_C, SQUARE_FX, SQUARE_FY, HEAD_SUMS };
// Sums that blocks of `longest` or `row_terms` leave to `cka_large_head`. For each row, k and l are
// the sums of its products with all other rows; r and q are its energies in X and Y.
enum RowSum {
  SUM_K,
  SUM_L,
  SQUARE_K,
  SQUARE_L,
  PRODUCT_KL,
  PAIRS_XX,
  PAIRS_YY,
  PAIRS_XY,  // K_ij L_ij over all pairs with a long row, minus r q of all other rows
  REST_X,    // energies of all rows but the long ones
  REST_Y,
  MEAN_X,  // energies of the means
  MEAN_Y,
  ROW_SUMS
};
// What they store for each row, in pairs, X before Y. Two rows, which one warp stores, fill a sector.
struct alignas(16) RowTerms {
  float energies[2];  // r, q
  float sums[2];      // k, l
};
// A side's scalars for the backward pass; see backward.cuh.
enum Scalar {
  SCALE,            // factor of the products
  W_OWN,            // c_own
  W_OTHER,          // c_other
  USES_LOW_HALVES,  // 1 if low halves are multiplied as well, else 0
  ROW_TOTAL,        // what U-centering adds back to every element of alpha K + beta L
  ROW_OWN,          // alpha
  ROW_OTHER,        // beta
  INVERSE_OWN,      // 1 / norm of the features
  INVERSE_OTHER,
  SCALARS = 16
};

struct CkaLargeArguments {
  CkaLargeSide x, y;
  int rows;
  int width;     // of both sides in memory: the wider side's, rounded up to whole tiles
  int segments;  // of rows in `statistics`
  int row_blocks;
  bool debiased, distance;
  bool may_use_low_halves;  // where they matter; see head.h
  bool hopper;              // use the kernels for Hopper
  Schedule schedule;
  float* pivots;      // [2][width]
  float* sums;        // [2][segments][width], of columns minus their pivots
  float* statistics;  // [STATISTICS][statistics_blocks()]
  UnitScales* scales;
  double* pivot_energies;  // [2]
  float* tiles;            // see MomentsArguments
  float* spill;
  // [2][width], of all rows; once `longest` has found long rows, of the others.
  float* means;
  unsigned long long* candidates;  // [row_blocks][MAX_LONG_ROWS]
  int* long_rows;                  // [MAX_LONG_ROWS], rows or -1
  unsigned short* long_features;   // [2][MAX_LONG_ROWS][width], those of long rows
  unsigned short* patches;         // see MomentsArguments
  RowTerms* row_terms;             // [rows], of scaled, centered rows
  float* row_products;             // [rows][2][MAX_LONG_ROWS], with the long rows
  double* row_sums;                // [ROW_SUMS][row_blocks]
  // [row_blocks][4][width]: sums over the rows of a block, of X weighted with k, X with l, Y with l
  // and Y with k.
  float* weighted_parts;
  float* weighted_sums;  // [4][width]: of all parts
  double* head_sums;     // [HEAD_SUMS][strip_blocks()]
  unsigned* counters;    // [2]
  // [2 halves][2 width][width]: A above F = C^T - t A for X, B above F = C - t B for Y; null if no
  // gradient is wanted.
  unsigned short *planes_x, *planes_y;
  float *shift_x, *shift_y;  // [2 halves][width / STRIP][width]
  float* value;
  float* scalars;  // [2][SCALARS]

  RIFT_HOST_DEVICE constexpr int statistics_blocks() const {
    return width / STATISTICS_COLUMNS * segments;
  }
  RIFT_HOST_DEVICE constexpr int strip_blocks() const { return schedule.tiles() * STRIPS; }
  // Pieces of patches, 128 columns each, that the blocks of `row_terms` share.
  RIFT_HOST_DEVICE constexpr int patch_pieces() const {
    return 2 * MAX_LONG_ROWS * (width / MOMENT_BLOCK);
  }
  // The last blocks of `cka_large_head` sum `weighted_parts`.
  RIFT_HOST_DEVICE constexpr int head_blocks() const {
    return strip_blocks() + (debiased ? 4 * width / 256 : 0);
  }
};

// What the caller chooses; all other arguments follow from it.
struct CkaLargeCall {
  CkaLargeSide x, y;
  int rows;
  bool student, teacher, debiased, distance, may_use_low_halves;
  int processors;
  bool hopper;
};

// Memory from which arrays are taken in sequence; without a base, it only counts their bytes.
struct Arena {
  unsigned char* base;
  long long bytes;

  template <typename T>
  RIFT_HOST_DEVICE constexpr T* take(long long count) {
    T* array = base && count ? reinterpret_cast<T*>(base + bytes) : nullptr;
    // Aligned as the copy engine requires.
    bytes += (count * static_cast<long long>(sizeof(T)) + 127) / 128 * 128;
    return array;
  }
};

// Scratch memory of the forward pass, and what it saves for the backward pass.
struct CkaLargeMemory {
  Arena scratch, saved;
};

RIFT_HOST_DEVICE constexpr int ceil_div(int value, int step) { return (value + step - 1) / step; }

// The arguments of a call; takes its arrays from `memory`.
RIFT_HOST_DEVICE constexpr CkaLargeArguments cka_large_arguments(const CkaLargeCall& call,
                                                                 CkaLargeMemory& memory) {
  CkaLargeArguments arguments{};
  arguments.x = call.x;
  arguments.y = call.y;
  arguments.rows = call.rows;
  const int wider = call.x.width > call.y.width ? call.x.width : call.y.width;
  const int width = arguments.width = ceil_div(wider, MOMENT_BLOCK) * MOMENT_BLOCK;
  // About two blocks for each multiprocessor, with at least 256 rows each.
  const int segments = ceil_div(2 * call.processors, width / STATISTICS_COLUMNS);
  const int segment_limit = ceil_div(call.rows, 256);
  arguments.segments = segments < segment_limit ? segments : segment_limit;
  const int row_limit = ceil_div(call.rows, 8);
  arguments.row_blocks = call.processors < row_limit ? call.processors : row_limit;
  arguments.debiased = call.debiased;
  arguments.distance = call.distance;
  arguments.may_use_low_halves = call.may_use_low_halves;
  arguments.hopper = call.hopper;
  arguments.schedule =
      moments_schedule(call.rows, call.x.width, call.y.width, call.processors, call.hopper);

  // Arrays that only the debiased measure needs are empty otherwise.
  const long long debiased = call.debiased;
  const long long row_blocks = debiased * arguments.row_blocks;
  const long long plane = 4LL * width * width, shift = 2LL * (width / STRIP) * width;
  Arena &scratch = memory.scratch, &saved = memory.saved;
  arguments.pivots = scratch.take<float>(2LL * width);
  arguments.sums = scratch.take<float>(2LL * arguments.segments * width);
  arguments.statistics = scratch.take<float>(1LL * STATISTICS * arguments.statistics_blocks());
  arguments.scales = scratch.take<UnitScales>(1);
  arguments.pivot_energies = scratch.take<double>(2);
  arguments.tiles = scratch.take<float>(1LL * arguments.schedule.tiles() * MOMENT_TILE);
  arguments.spill = scratch.take<float>(spill_floats(arguments.schedule));
  arguments.row_sums = scratch.take<double>(row_blocks * ROW_SUMS);
  arguments.weighted_parts = scratch.take<float>(row_blocks * 4 * width);
  arguments.head_sums = scratch.take<double>(1LL * arguments.strip_blocks() * HEAD_SUMS);
  arguments.counters = scratch.take<unsigned>(2);
  arguments.candidates = scratch.take<unsigned long long>(row_blocks * MAX_LONG_ROWS);
  arguments.long_features =
      scratch.take<unsigned short>(debiased * 2 * MAX_LONG_ROWS * width);
  arguments.patches = scratch.take<unsigned short>(debiased * 2 * PATCH_ROWS * width);
  arguments.planes_x = saved.take<unsigned short>(call.student * plane);
  arguments.planes_y = saved.take<unsigned short>(call.teacher * plane);
  arguments.shift_x = saved.take<float>(call.student * shift);
  arguments.shift_y = saved.take<float>(call.teacher * shift);
  arguments.means = saved.take<float>(2LL * width);
  arguments.long_rows = saved.take<int>(debiased * MAX_LONG_ROWS);
  arguments.row_terms = saved.take<RowTerms>(debiased * call.rows);
  arguments.row_products = saved.take<float>(debiased * 2 * MAX_LONG_ROWS * call.rows);
  arguments.weighted_sums = saved.take<float>(debiased * 4 * width);
  arguments.scalars = saved.take<float>(2LL * SCALARS);
  return arguments;
}

}  // namespace rift
