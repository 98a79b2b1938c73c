// Arguments of the launches that make linear CKA in covariance form:
//
//   statistics, [longest, rows], moments_sm80 or _sm90, cka_large_head, backward_sm80 or _sm90
#pragma once

#include "cka_large/moments_layout.h"

namespace rift {

// bfloat16, rows contiguous, at multiples of 16 bytes; all rows count.
struct CkaLargeSide {
  const void* features;
  long long stride;
  int width;
};

// Columns of a block of `statistics`.
constexpr int STATISTICS_COLUMNS = 64;
// Energies about the pivot, see statistics.cuh, about the mean, and of both sides together.
enum Statistic { PIVOT_X, PIVOT_Y, ENERGY_X, ENERGY_Y, ENERGY_XY, STATISTICS };
// Rows of a tile that a block of `cka_large_head` owns.
constexpr int STRIP = 32;
constexpr int STRIPS = MOMENT_BLOCK / STRIP;
// Debiased, a row with more than LONG_SHARE times the mean energy is kept apart, and of few rows any;
// see longest.cuh.
constexpr float LONG_SHARE = 4;
constexpr int FEW_ROWS = 64;
// What blocks of `cka_large_head` leave to the last one.
enum HeadSum { SQUARE_A, SQUARE_B, SQUARE_C, SQUARE_FX, SQUARE_FY, HEAD_SUMS };
// What blocks of `rows` leave to it. K and L are the rows' sums of their products with all other rows;
// PAIRS_XY sums K_ij L_ij over all pairs i, j of which a row is long, less r q of all other rows; then
// come energies of these, and of the mean.
enum RowSum {
  SUM_K,
  SUM_L,
  SQUARE_K,
  SQUARE_L,
  PRODUCT_KL,
  PAIRS_XX,
  PAIRS_YY,
  PAIRS_XY,
  REST_X,
  REST_Y,
  MEAN_X,
  MEAN_Y,
  ROW_SUMS
};
// What `rows` keeps of each row: its energies r and q, k and l, its products with the long rows.
enum RowTerm { ENERGY, ROW_SUM = 2, ROW_PRODUCTS = 4, ROW_TERMS = 4 + 2 * MAX_LONG_ROWS };
// A side's scalars for the backward.
enum Scalar {
  SCALE,
  OWN,
  OTHER,
  LOW_HALVES,
  ROW,
  ROW_OWN,
  ROW_OTHER,
  INVERSE_OWN,
  INVERSE_OTHER,
  SCALARS = 16
};

struct CkaLargeArguments {
  CkaLargeSide x, y;
  int rows;
  int width;     // of both sides in memory: the wider one's, in whole tiles
  int segments;  // of rows, for statistics
  int row_programs;
  bool debiased, distance, high;
  bool hopper;  // its own kernels, and not those that run anywhere
  Schedule schedule;
  float* pivots;      // [2][width]
  float* sums;        // [2][segments][width], of columns less their pivots
  float* statistics;  // [STATISTICS][statistics_programs()]
  float* tiles;       // see MomentsArguments
  float* spill;
  float* means;                    // [2][width]
  float* shares;                   // [rows], of all energy: the larger one of both sides
  unsigned long long* candidates;  // [row_programs][MAX_LONG_ROWS]
  int* long_rows;                  // [MAX_LONG_ROWS], rows or -1
  unsigned short* patches;         // [2][PATCH_ROWS][width]: the chunks of long rows, without these
  float* row_terms;                // [ROW_TERMS][rows]: of scaled, centered rows
  double* row_sums;                // [row_programs][ROW_SUMS]
  float* weighted;                 // [row_programs][4][width]: X by r, X by q, Y by q, Y by r
  float* weights;                  // [4][width]: their sums
  double* head_sums;               // [head_programs()][HEAD_SUMS]
  unsigned* counters;              // [2]
  // Each [2 halves][2 width][width]: A above F^T, B above F; null where no gradient is wanted.
  unsigned short *planes_x, *planes_y;
  float *shift_x, *shift_y;  // [2 halves][width / STRIP][width]
  float* value;
  float* scalars;  // [2][SCALARS]

  RIFT_HOST_DEVICE constexpr int statistics_programs() const {
    return width / STATISTICS_COLUMNS * segments;
  }
  RIFT_HOST_DEVICE constexpr int strip_programs() const { return schedule.tiles() * STRIPS; }
  // Blocks of `rows` behind those of rows make patches, 128 columns each.
  RIFT_HOST_DEVICE constexpr int patch_programs() const {
    return 2 * MAX_LONG_ROWS * (width / MOMENT_BLOCK);
  }
  // Blocks behind those of strips add up `weighted`.
  RIFT_HOST_DEVICE constexpr int head_programs() const {
    return strip_programs() + (debiased ? 4 * width / 256 : 0);
  }
};

// What a call is about; everything else follows.
struct CkaLargeCall {
  CkaLargeSide x, y;
  int rows;
  bool student, teacher, debiased, distance, high;
  int processors;
  bool hopper;
};

// Two pieces of memory: what the forward needs, and what the backward does.
struct CkaLargeMemory {
  unsigned char *scratch, *saved;
  long long scratch_bytes, saved_bytes;

  template <typename T>
  RIFT_HOST_DEVICE constexpr T* take(bool keep, long long count) {
    long long& at = keep ? saved_bytes : scratch_bytes;
    unsigned char* base = keep ? saved : scratch;
    T* taken = base && count ? reinterpret_cast<T*>(base + at) : nullptr;
    // As the copy engine wants it.
    at += (count * static_cast<long long>(sizeof(T)) + 127) / 128 * 128;
    return taken;
  }
};

RIFT_HOST_DEVICE constexpr int ceil_div(int value, int step) { return (value + step - 1) / step; }

// The arguments of a call, in memory of which only the addresses have to be known; counts its bytes.
RIFT_HOST_DEVICE constexpr CkaLargeArguments cka_large_arguments(const CkaLargeCall& call,
                                                                 CkaLargeMemory& memory) {
  CkaLargeArguments all{};
  all.x = call.x;
  all.y = call.y;
  all.rows = call.rows;
  const int wider = call.x.width > call.y.width ? call.x.width : call.y.width;
  const int width = all.width = ceil_div(wider, MOMENT_BLOCK) * MOMENT_BLOCK;
  // Two blocks a processor, of not too few rows each.
  const int wanted = ceil_div(2 * call.processors, width / STATISTICS_COLUMNS);
  const int most = ceil_div(call.rows, 256);
  all.segments = wanted < most ? wanted : most;
  const int eighths = ceil_div(call.rows, 8);
  all.row_programs = call.processors < eighths ? call.processors : eighths;
  all.debiased = call.debiased;
  all.distance = call.distance;
  all.high = call.high;
  all.hopper = call.hopper;
  all.schedule =
      moments_schedule(call.rows, call.x.width, call.y.width, call.processors, call.hopper);

  const long long plane = 4LL * width * width, shift = 2LL * (width / STRIP) * width;
  all.pivots = memory.take<float>(false, 2LL * width);
  all.sums = memory.take<float>(false, 2LL * all.segments * width);
  all.statistics = memory.take<float>(false, 1LL * STATISTICS * all.statistics_programs());
  all.tiles = memory.take<float>(false, 1LL * all.schedule.tiles() * MOMENT_TILE);
  all.spill = memory.take<float>(false, spill_floats(all.schedule));
  all.row_sums = memory.take<double>(false, call.debiased * 1LL * all.row_programs * ROW_SUMS);
  all.weighted = memory.take<float>(false, call.debiased * 4LL * all.row_programs * width);
  all.head_sums = memory.take<double>(false, 1LL * all.strip_programs() * HEAD_SUMS);
  all.counters = memory.take<unsigned>(false, 2);
  all.shares = memory.take<float>(false, call.debiased * 1LL * call.rows);
  all.candidates = memory.take<unsigned long long>(
      false, call.debiased * 1LL * all.row_programs * MAX_LONG_ROWS);
  all.patches = memory.take<unsigned short>(false, call.debiased * 2LL * PATCH_ROWS * width);
  all.planes_x = memory.take<unsigned short>(true, call.student * plane);
  all.planes_y = memory.take<unsigned short>(true, call.teacher * plane);
  all.shift_x = memory.take<float>(true, call.student * shift);
  all.shift_y = memory.take<float>(true, call.teacher * shift);
  all.means = memory.take<float>(true, 2LL * width);
  all.long_rows = memory.take<int>(true, call.debiased * 1LL * MAX_LONG_ROWS);
  all.row_terms = memory.take<float>(true, call.debiased * 1LL * ROW_TERMS * call.rows);
  all.weights = memory.take<float>(true, call.debiased * 4LL * width);
  all.scalars = memory.take<float>(true, 2LL * SCALARS);
  return all;
}

}  // namespace rift
