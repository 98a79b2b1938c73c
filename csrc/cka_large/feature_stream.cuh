// Features on their way from memory: each thread fetches the vectors that it needs some rows ahead,
// into a part of shared memory that no other thread reads. So it waits for copies, but at no
// barrier, and many copies are in flight without occupying registers.
#pragma once

#include "cka_large/layout.h"
#include "common/elements.cuh"

namespace rift {

constexpr int FEATURE_VECTOR = 8;  // features of one copy, 16 bytes
using FeatureVector = Vector<uint32_t, FEATURE_VECTOR / 2>;

__device__ inline void unpack(const FeatureVector& vector, float (&x)[FEATURE_VECTOR]) {
#pragma unroll
  for (int i = 0; i < FEATURE_VECTOR / 2; ++i) {
    x[2 * i] = bits_to_float(vector.elements[i] << 16);
    x[2 * i + 1] = bits_to_float(vector.elements[i] & 0xFFFF0000);
  }
}

// Reads the eight floats that belong to each lane's vector of features. A pair of lanes reads the
// sector of one and then that of the other, and they exchange what is not their own.
__device__ inline void load_floats(const float* from, float (&x)[FEATURE_VECTOR]) {
  const bool is_odd = threadIdx.x % 2;
  const auto* sectors = reinterpret_cast<const Vector<float, 4>*>(from) - is_odd;
  const Vector<float, 4> even = sectors[0], odd = sectors[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sent = is_odd ? even.elements[i] : odd.elements[i];
    const float received = __shfl_xor_sync(0xffffffffu, sent, 1);
    x[i] = is_odd ? received : even.elements[i];
    x[4 + i] = is_odd ? odd.elements[i] : received;
  }
}

// The vectors of a side that begin at one column: that of the first row, and their bytes within the
// width.
struct FeatureColumns {
  const Bf16* first;
  int bytes;
};

__device__ inline FeatureColumns feature_columns(const CkaLargeSide& side, int column) {
  const int count = min(max(side.width - column, 0), FEATURE_VECTOR);
  return {static_cast<const Bf16*>(side.features) + column, 2 * count};
}

// A circular buffer of SLOTS groups of copies, each of vectors of X and Y in ROWS rows. A slot may
// be fetched into once it has been read.
template <int THREADS, int ROWS, int SLOTS>
struct FeatureStream {
  static constexpr int BYTES = SLOTS * ROWS * 2 * THREADS * static_cast<int>(sizeof(FeatureVector));
  unsigned char* memory;

  __device__ FeatureVector* vector(int slot, int row, int side) const {
    auto* vectors = reinterpret_cast<FeatureVector*>(memory);
    return vectors + ((slot * ROWS + row) * 2 + side) * THREADS + threadIdx.x;
  }

  // Starts to fetch a vector, `offset` elements after that of the first row. Zeros take the place
  // of columns beyond the width, and of a row that does not exist: nothing of it is read.
  __device__ void fetch(int slot, int row, int side, const FeatureColumns& columns,
                        long long offset, bool exists) const {
    copy_async(vector(slot, row, side), columns.first + offset, exists ? columns.bytes : 0);
  }

  __device__ void read(int slot, int row, int side, float (&x)[FEATURE_VECTOR]) const {
    unpack(*vector(slot, row, side), x);
  }
};

}  // namespace rift
