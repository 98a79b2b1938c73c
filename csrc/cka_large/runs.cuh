// Long sums on tensor cores, which cut off and do not round.
//
// What falls off grows with the accumulator, and always makes a sum smaller: of N rows about
// N 2^-24, of which taking the means off leaves (mean / deviation)^2 as much. So an accumulator sums
// a run of at most MOMENT_RUN chunks, in which a product of two bfloat16 keeps all its bits. What came
// so far is kept beside it in one bfloat16, together with half of what the next run should add, by
// what the runs before have added: so the accumulator begins at about minus that half, and what is cut
// off before it passes 0 and after it cancel. Total and accumulator are the sum, to the last bit.
#pragma once

#include "common/elements.cuh"

namespace rift {

// Chunks: 1024 rows.
constexpr int MOMENT_RUN = 16;

// Chunks of the run that follows `done` of them: runs double, because what they begin at is a guess
// from those before.
RIFT_HOST_DEVICE constexpr int next_run(int done, int left) {
  const int run = done == 0 ? 1 : done < MOMENT_RUN ? done : MOMENT_RUN;
  return run < left ? run : left;
}

// Totals of SIZE accumulators, two in a register.
template <int SIZE>
struct Totals {
  uint32_t pairs[SIZE / 2] = {};

  // Ends a run: `done` chunks are through, the next run has `next`. Behind the last one, 0, the sums
  // are in both.
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
