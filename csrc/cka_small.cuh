// Linear CKA of up to 128 rows, value and gradients, in one launch.
//
//   value  = <Kx, Ky> / (||Kx|| ||Ky||),  K = Xc Xc^T of either side, U-centered if debiased
//   grad_X = (own_x Kx + other Ky) Xc,    see cka_head.h
//
// A group of blocks owns a layer, each block some columns of all its rows:
//   1. its columns, centered in float32, into shared memory as two bfloat16 each
//   2. what they add to Kx and Ky, upper tiles only, three products
//   3. the group adds up: each block a range of elements, in the order of the blocks; then all take
//      all ranges, and every block has both K, the same to the last bit
//   4. every block computes norms, value and coefficients, all the same
//   5. its columns of the gradients, the coefficients' matrix formed in float32 in registers
// The group is a cluster that reads one another's shared memory or, before sm_90, blocks that run
// at once and meet in global memory.
//
// Bytes: the features once, the gradients once; between blocks, both K twice.
#pragma once

#include "cka_head.h"
#include "cka_small_layout.h"
#include "reduce.cuh"
#include "types.cuh"

namespace rift {

// Where the blocks of a layer meet.
template <bool CLUSTER>
struct Group {
  float* mine;           // exchange_floats of this block
  const float* first;    // of the first block, where the others lie behind it
  unsigned* counter;     // of arrivals, where there is no cluster
  int blocks, floats;

  __device__ const float* of(int rank) const {
    return CLUSTER ? map_to_rank(mine, rank) : first + static_cast<long long>(rank) * floats;
  }

  __device__ void meet() const {
    if (CLUSTER) {
      cluster_barrier();
      return;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      // Never set back: every launch adds a multiple of the number of blocks.
      const unsigned count = static_cast<unsigned>(blocks);
      const unsigned goal = atomicAdd(counter, 1u) / count * count + count;
      while (static_cast<int>(load_acquire(counter) - goal) < 0) {
      }
      __threadfence();
    }
    __syncthreads();
  }
};

// One side's columns of one block in shared memory: high and low halves, (ROWS, share) each.
template <int ROWS>
struct Planes {
  uint16_t *high, *low;
  int pitch, share;

  // The features as they are, all 32 bits of them; 0 for what is masked or outside.
  template <typename T>
  __device__ void load(const T* features, long long stride_n, long long stride_d,
                       const unsigned char* valid, int width) const {
    constexpr int SIZE = 16 / static_cast<int>(sizeof(T));
    if (stride_d == 1 && stride_n % SIZE == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0) {
      load_vectors<T, SIZE>(features, stride_n, stride_d, valid, width);
    } else {
      load_vectors<T, 1>(features, stride_n, stride_d, valid, width);
    }
  }

  template <typename T, int SIZE>
  __device__ void load_vectors(const T* features, long long stride_n, long long stride_d,
                               const unsigned char* valid, int width) const {
    // So many are under way at once.
    constexpr int BATCH = 4;
    const int threads = blockDim.x, row_steps = share / SIZE, steps = ROWS * row_steps;
    for (int first = threadIdx.x; first < steps; first += threads * BATCH) {
      Vector<T, SIZE> from[BATCH] = {};
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int step = first + i * threads, row = step / row_steps;
        const int column = step % row_steps * SIZE;
        if (step >= steps || !valid[row]) continue;
        const T* at = features + row * stride_n + column * stride_d;
        if (column + SIZE <= width) {
          from[i] = *reinterpret_cast<const Vector<T, SIZE>*>(at);
        } else {
          for (int k = 0; k < SIZE; ++k) {
            if (column + k < width) from[i].elements[k] = at[k];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int step = first + i * threads, at = step / row_steps * pitch + step % row_steps * SIZE;
        if (step >= steps) continue;
        Vector<uint16_t, SIZE> high_bits, low_bits;
#pragma unroll
        for (int k = 0; k < SIZE; ++k) {
          const uint32_t bits = float_to_bits(to_float(from[i].elements[k]));
          high_bits.elements[k] = static_cast<uint16_t>(bits >> 16);
          low_bits.elements[k] = static_cast<uint16_t>(bits);
        }
        *reinterpret_cast<Vector<uint16_t, SIZE>*>(high + at) = high_bits;
        *reinterpret_cast<Vector<uint16_t, SIZE>*>(low + at) = low_bits;
      }
    }
  }

  // Takes the mean off every column, exactly all of a constant one, and leaves it in two halves.
  // Returns this thread's part of the columns' energy about their first valid row.
  //
  // Half a warp owns two columns at a time, each lane every 16th row of them, in registers.
  __device__ float center(const unsigned char* valid, int first, int count) const {
    constexpr int LANES = 16, STEPS = ROWS / LANES;
    const int lane = threadIdx.x % LANES;
    float varies = 0;
    for (int column = threadIdx.x / LANES * 2; column < share; column += blockDim.x / LANES * 2) {
      float pivot[2] = {}, x[STEPS][2], mean[2] = {};
      if (first < ROWS) read_pair(first * pitch + column, pivot);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        read_pair((lane + i * LANES) * pitch + column, x[i]);
        const bool counts = valid[lane + i * LANES];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          x[i][k] = counts ? x[i][k] - pivot[k] : 0;
          varies += x[i][k] * x[i][k];
        }
      }
      // The second time of what rounding has left of the mean.
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < STEPS; ++i) {
            sum += valid[lane + i * LANES] ? x[i][k] - mean[k] : 0;
          }
          mean[k] += lane_sum(sum, LANES) / static_cast<float>(count);
        }
      }
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        const bool counts = valid[lane + i * LANES];
        uint32_t high_pair, low_pair;
        split_pair(counts ? x[i][0] - mean[0] : 0, counts ? x[i][1] - mean[1] : 0, high_pair,
                   low_pair);
        const int at = (lane + i * LANES) * pitch + column;
        *reinterpret_cast<uint32_t*>(high + at) = high_pair;
        *reinterpret_cast<uint32_t*>(low + at) = low_pair;
      }
    }
    return varies;
  }

  // Two neighbours of a row, as load has left them.
  __device__ void read_pair(int at, float (&x)[2]) const {
    const uint32_t high_pair = *reinterpret_cast<const uint32_t*>(high + at);
    const uint32_t low_pair = *reinterpret_cast<const uint32_t*>(low + at);
    x[0] = bits_to_float(high_pair << 16 | (low_pair & 0xFFFF));
    x[1] = bits_to_float((high_pair & 0xFFFF0000) | low_pair >> 16);
  }

  // Where this lane's row of a 16 x 16 tile begins, for load_matrices.
  __device__ int lane_row(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return (row + lane % 16) * pitch + column + lane / 16 * 8;
  }

  // A tile of X X^T over this block's columns.
  __device__ void gram_tile(Pair pair, float* out) const {
    float c[2][4] = {};
    for (int k = 0; k < share; k += TILE_ROWS) {
      uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
      load_matrices(a_high, high + lane_row(pair.i * TILE_ROWS, k));
      load_matrices(a_low, low + lane_row(pair.i * TILE_ROWS, k));
      load_matrices(b_high, high + lane_row(pair.j * TILE_ROWS, k));
      load_matrices(b_low, low + lane_row(pair.j * TILE_ROWS, k));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_add(c[half], a_low, b_high[half], b_high[half + 2]);
        multiply_add(c[half], a_high, b_low[half], b_low[half + 2]);
        multiply_add(c[half], a_high, b_high[half], b_high[half + 2]);
      }
    }
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[(row + i / 2 * 8) * TILE_PITCH + half * 8 + column + i % 2] = c[half][i];
      }
    }
  }

  // This block's columns of (own K + other K') X.
  template <typename G>
  __device__ void gradient(const float* k_own, const float* k_other, float own, float other,
                           float inverse, G* grad, int rows, int width, int full_width) const {
    constexpr int TILES = ROWS / TILE_ROWS;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    // Rows of tiles over the warps, and columns where warps are left.
    const int across = max(1, warps / TILES);
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = warp / across; i < TILES; i += warps / across) {
      uint32_t m_high[TILES][4], m_low[TILES][4];
#pragma unroll
      for (int k = 0; k < TILES; ++k) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int m_row = i * TILE_ROWS + row + part % 2 * 8;
          const int m_column = k * TILE_ROWS + column + part / 2 * 8;
          const int first = element_at(m_row, m_column), second = element_at(m_row, m_column + 1);
          split_pair(own * k_own[first] + other * k_other[first],
                     own * k_own[second] + other * k_other[second], m_high[k][part],
                     m_low[k][part]);
        }
      }
      for (int j = warp % across * TILE_ROWS; j < share; j += across * TILE_ROWS) {
        float c[2][4] = {};
#pragma unroll
        for (int k = 0; k < TILES; ++k) {
          uint32_t x_high[4], x_low[4];
          load_matrices_transposed(x_high, high + lane_row(k * TILE_ROWS, j));
          load_matrices_transposed(x_low, low + lane_row(k * TILE_ROWS, j));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply_add(c[half], m_low[k], x_high[2 * half], x_high[2 * half + 1]);
            multiply_add(c[half], m_high[k], x_low[2 * half], x_low[2 * half + 1]);
            multiply_add(c[half], m_high[k], x_high[2 * half], x_high[2 * half + 1]);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            const int out_row = i * TILE_ROWS + row + part / 2 * 8;
            const int out_column = j + half * 8 + column + part % 2;
            if (out_row < rows && out_column < width) {
              from_float(c[half][part] * inverse * inverse,
                         grad + static_cast<long long>(out_row) * full_width + out_column);
            }
          }
        }
      }
    }
  }
};

// Scales both K to features of unit norm and U-centers them if debiased, in place; their sums.
template <int ROWS>
__device__ CkaSums finish_grams(float* gram, const unsigned char* valid, int count, bool debiased,
                                float* offsets, double* scratch, float (&inverse)[2]) {
  constexpr int PAIRS = pair_count(ROWS / TILE_ROWS);
  const int threads = blockDim.x;
  CkaSums sums{};
  float* const peaks[2] = {&sums.peak_x, &sums.peak_y};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const float* k = gram + side * PAIRS * TILE_FLOATS;
    // By every warp: that is sooner done than told.
    float energy = 0, peak = 0;
    for (int row = threadIdx.x % 32; row < ROWS; row += 32) {
      const float x = k[element_at(row, row)];
      energy += x;
      peak = max(peak, x);
    }
    energy = lane_sum(energy);
    for (int lane = 16; lane > 0; lane /= 2) {
      peak = max(peak, __shfl_xor_sync(0xffffffffu, peak, lane));
    }
    inverse[side] = energy == 0 ? 1 : 1 / sqrtf(energy);
    *peaks[side] = peak * inverse[side] * inverse[side];
  }
  if (debiased) {
    // Neighbouring threads share a row where there are more of them than rows.
    const int parts = max(1, threads / (2 * ROWS));
    double totals[2] = {};
    for (int unit = threadIdx.x; unit < 2 * ROWS * parts; unit += threads) {
      const bool is_y = unit >= ROWS * parts;
      const int row = unit / parts % ROWS;
      const float* k = is_y ? gram + PAIRS * TILE_FLOATS : gram;
      const float scale = is_y ? inverse[1] : inverse[0];
      float sum = 0;
      for (int column = unit % parts; column < ROWS; column += parts) {
        if (column != row) sum += k[element_at(row, column)] * scale * scale;
      }
      sum = lane_sum(sum, parts);
      if (unit % parts == 0) {
        offsets[is_y * ROWS + row] = sum;
        totals[0] += is_y ? 0 : sum;
        totals[1] += is_y ? sum : 0;
      }
    }
    block_sums(totals, scratch);
    for (int unit = threadIdx.x; unit < 2 * ROWS; unit += threads) {
      const auto total = static_cast<float>(unit < ROWS ? totals[0] : totals[1]);
      offsets[unit] = u_center_offset(offsets[unit], total, static_cast<float>(count));
    }
    __syncthreads();
  }
  // <Kx, Kx>, <Ky, Ky>, <Kx, Ky>
  double products[3] = {};
  for (int index = threadIdx.x; index < PAIRS * TILE_ROWS * TILE_ROWS; index += threads) {
    const Element e = element(index);
    const bool kept = valid[e.row] && valid[e.column] && !(debiased && e.row == e.column);
    float centered[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float* at = gram + side * PAIRS * TILE_FLOATS + e.offset;
      float k = *at * inverse[side] * inverse[side];
      if (debiased) k -= offsets[side * ROWS + e.row] + offsets[side * ROWS + e.column];
      centered[side] = *at = kept ? k : 0;
    }
    const double times = times_of(e.row, e.column);
    products[0] += times * (centered[0] * centered[0]);
    products[1] += times * (centered[1] * centered[1]);
    products[2] += times * (centered[0] * centered[1]);
  }
  block_sums(products, scratch);
  sums.xx = products[0];
  sums.yy = products[1];
  sums.xy = products[2];
  return sums;
}

// Whether blocks of a kernel meet as this GPU lets them; the other kind of kernel stays empty.
template <bool CLUSTER>
__device__ constexpr bool runs_here() {
#ifdef __CUDA_ARCH__
  return CLUSTER == (__CUDA_ARCH__ >= 900);
#else
  return true;
#endif
}

// One block's part of one entry.
template <typename T, typename G, int ROWS, bool CLUSTER>
__device__ void run_cka_small(const CkaSmallArguments& arguments) {
  const int entry = blockIdx.y, rank = blockIdx.x, blocks = gridDim.x;
  const int threads = blockDim.x, warps = threads / 32, warp = threadIdx.x / 32;
  const CkaSmallLayer& layer = arguments.layers[arguments.batched ? 0 : entry];
  const long long batch = arguments.batched ? entry : 0;
  const CkaSmallLayout at = cka_small_layout(ROWS, arguments.share, blocks);
  unsigned char* memory = shared_memory();
  auto* planes = reinterpret_cast<uint16_t*>(memory);
  auto* gram = reinterpret_cast<float*>(memory + at.gram);
  auto* sums_scratch = reinterpret_cast<double*>(memory + at.sums);
  auto* offsets = reinterpret_cast<float*>(memory + at.offsets);
  unsigned char* valid = memory + at.valid;

  Group<CLUSTER> group{};
  group.blocks = blocks;
  group.floats = exchange_floats(ROWS, blocks);
  group.mine = gram;
  if (!CLUSTER) {
    group.first = arguments.workspace + static_cast<long long>(entry) * blocks * group.floats;
    group.mine = const_cast<float*>(group.of(rank));
    group.counter = arguments.counters + counter_at(entry, blocks);
  }

  const unsigned char* mask = layer.mask ? layer.mask + batch * arguments.batch_mask : nullptr;
  for (int row = threadIdx.x; row < ROWS; row += threads) {
    valid[row] = row < layer.rows && (!mask || mask[row]);
  }
  __syncthreads();
  int count = 0, first = ROWS;
  for (int row = ROWS - 1; row >= 0; --row) {
    count += valid[row];
    if (valid[row]) first = row;
  }

  const int begin = rank * arguments.share;
  const int width_x = min(layer.width_x - begin, arguments.share);
  const int width_y = min(layer.width_y - begin, arguments.share);
  const Planes<ROWS> x{planes, planes + at.plane, at.pitch, arguments.share};
  const Planes<ROWS> y{planes + 2 * at.plane, planes + 3 * at.plane, at.pitch, arguments.share};
  x.load(static_cast<const T*>(layer.x) + batch * arguments.batch_x + begin * layer.stride_xd,
         layer.stride_xn, layer.stride_xd, valid, width_x);
  y.load(static_cast<const T*>(layer.y) + batch * arguments.batch_y + begin * layer.stride_yd,
         layer.stride_yn, layer.stride_yd, valid, width_y);
  __syncthreads();
  const float varies_x = x.center(valid, first, count);
  const float varies_y = y.center(valid, first, count);
  __syncthreads();

  constexpr int PAIRS = pair_count(ROWS / TILE_ROWS);
  constexpr int FLOATS = gram_floats(ROWS), ELEMENTS = gram_elements(ROWS);
  for (int unit = warp; unit < 2 * PAIRS; unit += warps) {
    const bool is_y = unit >= PAIRS;
    const Planes<ROWS> side{is_y ? y.high : x.high, is_y ? y.low : x.low, x.pitch, x.share};
    side.gram_tile(pair_at(is_y ? unit - PAIRS : unit), group.mine + unit * TILE_FLOATS);
  }
  double varies[2] = {varies_x, varies_y};
  block_sums(varies, sums_scratch);
  if (threadIdx.x == 0) {
    group.mine[FLOATS] = static_cast<float>(varies[0]);
    group.mine[FLOATS + 1] = static_cast<float>(varies[1]);
  }
  group.meet();

  const int range = ELEMENTS / blocks;
  for (int index = threadIdx.x; index < range; index += threads) {
    const int from = element(rank * range + index).offset;
    float sum = 0;
    for (int other = 0; other < blocks; ++other) sum += group.of(other)[from];
    group.mine[FLOATS + 4 + index] = sum;
  }
  float energies[2] = {};
  for (int other = 0; other < blocks; ++other) {
    energies[0] += group.of(other)[FLOATS];
    energies[1] += group.of(other)[FLOATS + 1];
  }
  group.meet();
  for (int index = threadIdx.x; index < ELEMENTS; index += threads) {
    gram[element(index).offset] = group.of(index / range)[FLOATS + 4 + index % range];
  }
  __syncthreads();

  float inverse[2];
  CkaSums sums = finish_grams<ROWS>(gram, valid, count, arguments.debiased, offsets, sums_scratch,
                                    inverse);
  sums.varies_x = energies[0];
  sums.varies_y = energies[1];
  const CkaResult result = cka_head(sums, count, arguments.debiased, arguments.distance);
  if (rank == 0 && threadIdx.x == 0) arguments.values[entry] = result.value;

  const float* kx = gram;
  const float* ky = gram + FLOATS / 2;
  if (layer.grad_x) {
    G* grad = static_cast<G*>(layer.grad_x) + batch * arguments.batch_grad_x + begin;
    x.gradient(kx, ky, result.own_x, result.other, inverse[0], grad, layer.rows, width_x,
               layer.width_x);
  }
  if (layer.grad_y) {
    G* grad = static_cast<G*>(layer.grad_y) + batch * arguments.batch_grad_y + begin;
    y.gradient(ky, kx, result.own_y, result.other, inverse[1], grad, layer.rows, width_y,
               layer.width_y);
  }
  // Nobody leaves while another may still read what it has left in its shared memory.
  if (CLUSTER) cluster_barrier();
}

// T features, G gradients. A row of blocks for each entry, blockIdx.y counting entries.
template <typename T, typename G, int ROWS, bool CLUSTER>
__global__ void __launch_bounds__(THREADS, 1)
    cka_small_kernel(const __grid_constant__ CkaSmallArguments arguments) {
  if constexpr (runs_here<CLUSTER>()) run_cka_small<T, G, ROWS, CLUSTER>(arguments);
}

}  // namespace rift
