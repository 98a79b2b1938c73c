// Arguments of the launches that make linear CKA in covariance form:
//
//   statistics, moments_sm80 or _sm90, [rows], covariance_head, backward_sm80 or _sm90
#pragma once

#include "moments_layout.h"

namespace rift {

// bfloat16, rows contiguous, at multiples of 16 bytes; all rows count.
struct CovarianceSide {
  const void* features;
  long long stride;
  int width;
};

// Columns of a block of `statistics`.
constexpr int STATISTICS_COLUMNS = 64;
// Energies about the first row, about the mean, and of both sides together.
enum Statistic { PIVOT_X, PIVOT_Y, ENERGY_X, ENERGY_Y, ENERGY_XY, STATISTICS };
// Rows of a tile that a block of `covariance_head` owns.
constexpr int STRIP = 32;
constexpr int STRIPS = MOMENT_BLOCK / STRIP;
// What blocks of `covariance_head` leave to the last one.
enum HeadSum { SQUARE_A, SQUARE_B, SQUARE_C, SQUARE_FX, SQUARE_FY, HEAD_SUMS };
// What blocks of `rows` leave to it.
enum RowSum { SUM_R, SUM_Q, SQUARE_R, SQUARE_Q, PRODUCT_RQ, ROW_SUMS };
// A side's scalars for the backward.
enum Scalar { SCALE, OWN, OTHER, FULL, ROW, ROW_OWN, ROW_OTHER, INVERSE_OWN, INVERSE_OTHER, SCALARS = 16 };

struct CovarianceArguments {
  CovarianceSide x, y;
  int rows;
  int width;     // of both sides in memory: the wider one's, in whole tiles
  int segments;  // of rows, for statistics
  int row_programs;
  bool debiased, distance, high;
  bool hopper;  // its own kernels, and not those that run anywhere
  Schedule schedule;
  float* sums;        // [2][segments][width], of columns
  float* statistics;  // [STATISTICS][statistics_programs()]
  float* tiles;       // see MomentsArguments
  float* spill;
  float* means;       // [2][width]
  float* energies;    // [2][rows]: of scaled, centered rows
  double* row_sums;   // [row_programs][ROW_SUMS]
  float* weighted;    // [row_programs][4][width]: X by r, X by q, Y by q, Y by r
  float* weights;     // [4][width]: their sums
  double* head_sums;  // [head_programs()][HEAD_SUMS]
  unsigned* counter;
  // Each [2 halves][2 width][width]: A above F^T, B above F; null where no gradient is wanted.
  unsigned short *planes_x, *planes_y;
  float *shift_x, *shift_y;  // [2 halves][width / STRIP][width]
  float* value;
  float* scalars;  // [2][SCALARS]

  RIFT_BOTH constexpr int statistics_programs() const {
    return width / STATISTICS_COLUMNS * segments;
  }
  RIFT_BOTH constexpr int strip_programs() const { return schedule.tiles() * STRIPS; }
  // Blocks behind those of strips add up `weighted`.
  RIFT_BOTH constexpr int head_programs() const {
    return strip_programs() + (debiased ? 4 * width / 256 : 0);
  }
};

// What a call is about; everything else follows.
struct CovarianceCall {
  CovarianceSide x, y;
  int rows;
  bool student, teacher, debiased, distance, high;
  int processors;
  bool hopper;
};

// Two pieces of memory: what the forward needs, and what the backward does.
struct CovarianceMemory {
  unsigned char *scratch, *saved;
  long long scratch_bytes, saved_bytes;

  template <typename T>
  RIFT_BOTH constexpr T* take(bool keep, long long count) {
    long long& at = keep ? saved_bytes : scratch_bytes;
    unsigned char* base = keep ? saved : scratch;
    T* taken = base && count ? reinterpret_cast<T*>(base + at) : nullptr;
    // As the copy engine wants it.
    at += (count * static_cast<long long>(sizeof(T)) + 127) / 128 * 128;
    return taken;
  }
};

RIFT_BOTH constexpr int cut(int value, int step) { return (value + step - 1) / step; }

// The arguments of a call, in memory of which only the addresses have to be known; counts its bytes.
RIFT_BOTH constexpr CovarianceArguments covariance_arguments(const CovarianceCall& call,
                                                             CovarianceMemory& memory) {
  CovarianceArguments all{};
  all.x = call.x;
  all.y = call.y;
  all.rows = call.rows;
  const int wider = call.x.width > call.y.width ? call.x.width : call.y.width;
  const int width = all.width = cut(wider, MOMENT_BLOCK) * MOMENT_BLOCK;
  // Two blocks a processor, of not too few rows each.
  const int wanted = cut(2 * call.processors, width / STATISTICS_COLUMNS);
  const int most = cut(call.rows, 256);
  all.segments = wanted < most ? wanted : most;
  const int eighths = cut(call.rows, 8);
  all.row_programs = call.processors < eighths ? call.processors : eighths;
  all.debiased = call.debiased;
  all.distance = call.distance;
  all.high = call.high;
  all.hopper = call.hopper;
  all.schedule =
      moments_schedule(call.rows, call.x.width, call.y.width, call.processors, call.hopper);

  const long long plane = 4LL * width * width, shift = 2LL * (width / STRIP) * width;
  all.sums = memory.take<float>(false, 2LL * all.segments * width);
  all.statistics = memory.take<float>(false, 1LL * STATISTICS * all.statistics_programs());
  all.tiles = memory.take<float>(false, 1LL * all.schedule.tiles() * MOMENT_TILE);
  all.spill = memory.take<float>(false, spill_floats(all.schedule));
  all.row_sums = memory.take<double>(false, call.debiased * 1LL * all.row_programs * ROW_SUMS);
  all.weighted = memory.take<float>(false, call.debiased * 4LL * all.row_programs * width);
  all.head_sums = memory.take<double>(false, 1LL * all.strip_programs() * HEAD_SUMS);
  all.counter = memory.take<unsigned>(false, 1);
  all.planes_x = memory.take<unsigned short>(true, call.student * plane);
  all.planes_y = memory.take<unsigned short>(true, call.teacher * plane);
  all.shift_x = memory.take<float>(true, call.student * shift);
  all.shift_y = memory.take<float>(true, call.teacher * shift);
  all.means = memory.take<float>(true, 2LL * width);
  all.energies = memory.take<float>(true, call.debiased * 2LL * call.rows);
  all.weights = memory.take<float>(true, call.debiased * 4LL * width);
  all.scalars = memory.take<float>(true, 2LL * SCALARS);
  return all;
}

}  // namespace rift
