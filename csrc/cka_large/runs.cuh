// Long sums on tensor cores, which truncate instead of rounding.
//
// Truncation errors grow with the accumulator and always point towards 0. Over N rows they amount
// to about N 2^-24, and centering magnifies them by (mean / deviation)^2. So an accumulator sums
// only a run of at most MOMENT_RUN chunks, in which products of two bfloat16 keep all their bits.
//
// The total of earlier runs is kept next to the accumulator in one bfloat16. It includes half of
// what the next run should add, judging by the earlier runs. So the accumulator begins at about
// minus that half, and the errors before and after it crosses 0 cancel. Total plus accumulator is
// the exact sum.
#pragma once

#include "common/elements.cuh"

namespace rift {

// In chunks: 1024 rows.
constexpr int MOMENT_RUN = 16;

// Chunks of the run that follows `done` chunks, with `left` remaining. Runs grow by doubling,
// because their start values are extrapolated from earlier runs.
RIFT_HOST_DEVICE constexpr int next_run(int done, int left) {
  const int run = done == 0 ? 1 : done < MOMENT_RUN ? done : MOMENT_RUN;
  return run < left ? run : left;
}

// Totals of SIZE accumulators, two in each register.
template <int SIZE>
struct Totals {
  uint32_t pairs[SIZE / 2] = {};

  // Ends a run after `done` chunks; the next run has `next` chunks, 0 if there is none.
  __device__ void end_run(float (&c)[SIZE], int done, int next) {
    const float ahead = 1 + 0.5f * static_cast<float>(next) / static_cast<float>(done);
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i) {
      const float first = low(i) + c[2 * i], second = high(i) + c[2 * i + 1];
      pairs[i] = round_to_bf16_pair(first * ahead, second * ahead);
      c[2 * i] = first - low(i);
      c[2 * i + 1] = second - high(i);
    }
  }

  __device__ float sum(const float (&c)[SIZE], int i) const {
    return c[i] + (i % 2 ? high(i / 2) : low(i / 2));
  }

  __device__ float low(int i) const { return bits_to_float(pairs[i] << 16); }
  __device__ float high(int i) const { return bits_to_float(pairs[i] & 0xFFFF0000); }
};

}  // namespace rift
