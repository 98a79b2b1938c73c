// Linear CKA of up to 128 rows: value and gradients in one launch.
//
//   value  = <Kx, Ky> / (||Kx|| ||Ky||),  K = Xc Xc^T of each side, U-centered if debiased
//   grad_X = (own_x Kx + other Ky) Xc,    see head.h
//
// A group of blocks owns a layer, and each block owns some columns of all its rows. A block:
//   1. centers its columns in float32 and stores them in shared memory as two bfloat16 each
//   2. computes what they add to Kx and Ky: upper tiles only, three products of halves
//   3. sums a range of elements over all blocks, in their order, and reads the other ranges: every
//      block then has the same Kx and Ky to the last bit
//   4. computes norms, value and coefficients, as every other block does
//   5. computes its columns of the gradients; own_x Kx + other Ky is formed in float32 in registers
// The group is a cluster, which exchanges data through distributed shared memory. Before sm_90, its
// blocks are launched cooperatively and exchange data through global memory.
//
// Memory traffic: features and gradients once; between blocks, Kx and Ky twice.
#pragma once

#include "cka_small/head.h"
#include "cka_small/layout.h"
#include "cka_small/planes.cuh"
#include "common/elements.cuh"
#include "common/reduce.cuh"

namespace rift {

// The blocks of a layer: their barrier, and the memory through which they exchange data.
template <bool CLUSTER>
struct BlockGroup {
  float* local;            // exchange_floats of this block
  const float* workspace;  // exchange_floats of each block; null in a cluster
  unsigned* counter;       // of arrivals at the barrier; null in a cluster
  int blocks, floats;

  __device__ const float* exchange(int rank) const {
    return CLUSTER ? map_to_rank(local, rank) : workspace + static_cast<long long>(rank) * floats;
  }

  __device__ void barrier() const {
    if (CLUSTER) {
      cluster_barrier();
      return;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      // The counter is never reset, because every barrier adds the number of blocks.
      const unsigned count = static_cast<unsigned>(blocks);
      const unsigned goal = atomicAdd(counter, 1u) / count * count + count;
      while (static_cast<int>(load_acquire(counter) - goal) < 0) {
      }
      __threadfence();
    }
    __syncthreads();
  }
};

// Scales both Gram matrices, in place, to those of features of unit norm, and U-centers them if
// debiased. Returns the sums that cka_head needs.
template <int ROWS>
__device__ CkaSums normalize_grams(float* gram, const unsigned char* valid, int count,
                                   bool debiased, float* offsets, double* scratch,
                                   float (&inverse)[2]) {
  constexpr int GRAM_TILES = tile_count(ROWS / TILE_ROWS);
  const int threads = blockDim.x;
  CkaSums sums{};
  float* const peaks[2] = {&sums.peak_x, &sums.peak_y};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const float* k = gram + side * GRAM_TILES * TILE_FLOATS;
    // Every warp computes this itself, which is faster than broadcasting it.
    float energy = 0, peak = 0;
    for (int row = threadIdx.x % 32; row < ROWS; row += 32) {
      const float x = k[element_offset(row, row)];
      energy += x;
      peak = max(peak, x);
    }
    energy = warp_sum(energy);
    for (int lane = 16; lane > 0; lane /= 2) {
      peak = max(peak, __shfl_xor_sync(0xffffffffu, peak, lane));
    }
    inverse[side] = energy == 0 ? 1 : 1 / sqrtf(energy);
    *peaks[side] = peak * inverse[side] * inverse[side];
  }
  if (debiased) {
    // If there are more threads than rows, adjacent threads share a row.
    const int parts = max(1, threads / (2 * ROWS));
    double totals[2] = {};
    for (int unit = threadIdx.x; unit < 2 * ROWS * parts; unit += threads) {
      const bool is_y = unit >= ROWS * parts;
      const int row = unit / parts % ROWS;
      const float* k = is_y ? gram + GRAM_TILES * TILE_FLOATS : gram;
      const float scale = is_y ? inverse[1] : inverse[0];
      float sum = 0;
      for (int column = unit % parts; column < ROWS; column += parts) {
        if (column != row) sum += k[element_offset(row, column)] * scale * scale;
      }
      sum = warp_sum(sum, parts);
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
  }
  // All threads have read the diagonals, which are overwritten next, and the offsets are written.
  __syncthreads();
  // <Kx, Kx>, <Ky, Ky>, <Kx, Ky>
  double products[3] = {};
  for (int index = threadIdx.x; index < GRAM_TILES * TILE_ROWS * TILE_ROWS; index += threads) {
    const Element e = element_at(index);
    const bool included = valid[e.row] && valid[e.column] && !(debiased && e.row == e.column);
    float centered[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float* element = gram + side * GRAM_TILES * TILE_FLOATS + e.offset;
      float k = *element * inverse[side] * inverse[side];
      if (debiased) k -= offsets[side * ROWS + e.row] + offsets[side * ROWS + e.column];
      centered[side] = *element = included ? k : 0;
    }
    const double weight = multiplicity(e.row, e.column);
    products[0] += weight * (centered[0] * centered[0]);
    products[1] += weight * (centered[1] * centered[1]);
    products[2] += weight * (centered[0] * centered[1]);
  }
  block_sums(products, scratch);
  sums.xx = products[0];
  sums.yy = products[1];
  sums.xy = products[2];
  return sums;
}

// Whether this architecture runs the kernels with, or without, clusters; the others stay empty.
template <bool CLUSTER>
__device__ constexpr bool matches_architecture() {
#ifdef __CUDA_ARCH__
  return CLUSTER == (__CUDA_ARCH__ >= 900);
#else
  return true;
#endif
}

// One block's share of one entry.
template <typename T, typename G, int ROWS, bool CLUSTER>
__device__ void run_cka_small(const CkaSmallArguments& arguments) {
  const int entry = blockIdx.y, rank = blockIdx.x, blocks = gridDim.x;
  const int threads = blockDim.x, warps = threads / 32, warp = threadIdx.x / 32;
  const CkaSmallLayer& layer = arguments.layers[arguments.batched ? 0 : entry];
  const long long batch = arguments.batched ? entry : 0;
  const CkaSmallLayout layout = cka_small_layout(ROWS, arguments.block_columns, blocks);
  unsigned char* memory = shared_memory();
  auto* planes = reinterpret_cast<uint16_t*>(memory);
  auto* gram = reinterpret_cast<float*>(memory + layout.gram);
  auto* sums_scratch = reinterpret_cast<double*>(memory + layout.sums);
  auto* offsets = reinterpret_cast<float*>(memory + layout.offsets);
  unsigned char* valid = memory + layout.valid;

  BlockGroup<CLUSTER> group{};
  group.blocks = blocks;
  group.floats = exchange_floats(ROWS, blocks);
  group.local = gram;
  if (!CLUSTER) {
    group.workspace = arguments.workspace + static_cast<long long>(entry) * blocks * group.floats;
    group.local = const_cast<float*>(group.exchange(rank));
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

  const int begin = rank * arguments.block_columns;
  const int width_x = min(layer.width_x - begin, arguments.block_columns);
  const int width_y = min(layer.width_y - begin, arguments.block_columns);
  const Planes<ROWS> x{planes, planes + layout.plane, layout.pitch, arguments.block_columns};
  const Planes<ROWS> y{planes + 2 * layout.plane, planes + 3 * layout.plane, layout.pitch,
                       arguments.block_columns};
  x.load(static_cast<const T*>(layer.x) + batch * arguments.batch_x + begin * layer.stride_xd,
         layer.stride_xn, layer.stride_xd, valid, width_x);
  y.load(static_cast<const T*>(layer.y) + batch * arguments.batch_y + begin * layer.stride_yd,
         layer.stride_yn, layer.stride_yd, valid, width_y);
  __syncthreads();
  const float pivot_energy_x = x.center(valid, first, count);
  const float pivot_energy_y = y.center(valid, first, count);
  __syncthreads();

  constexpr int GRAM_TILES = tile_count(ROWS / TILE_ROWS);
  constexpr int FLOATS = gram_floats(ROWS), ELEMENTS = gram_elements(ROWS);
  for (int unit = warp; unit < 2 * GRAM_TILES; unit += warps) {
    const bool is_y = unit >= GRAM_TILES;
    const Planes<ROWS> planes_of_side{is_y ? y.high : x.high, is_y ? y.low : x.low, x.pitch,
                                      x.block_columns};
    planes_of_side.gram_tile(tile_coord(is_y ? unit - GRAM_TILES : unit),
                             group.local + unit * TILE_FLOATS);
  }
  double pivot_energies[2] = {pivot_energy_x, pivot_energy_y};
  block_sums(pivot_energies, sums_scratch);
  if (threadIdx.x == 0) {
    group.local[FLOATS] = static_cast<float>(pivot_energies[0]);
    group.local[FLOATS + 1] = static_cast<float>(pivot_energies[1]);
  }
  group.barrier();

  const int range = ELEMENTS / blocks;
  for (int index = threadIdx.x; index < range; index += threads) {
    const int offset = element_at(rank * range + index).offset;
    float sum = 0;
    for (int other = 0; other < blocks; ++other) sum += group.exchange(other)[offset];
    group.local[FLOATS + 4 + index] = sum;
  }
  float energies[2] = {};
  for (int other = 0; other < blocks; ++other) {
    energies[0] += group.exchange(other)[FLOATS];
    energies[1] += group.exchange(other)[FLOATS + 1];
  }
  group.barrier();
  for (int index = threadIdx.x; index < ELEMENTS; index += threads) {
    gram[element_at(index).offset] = group.exchange(index / range)[FLOATS + 4 + index % range];
  }
  __syncthreads();

  float inverse[2];
  CkaSums sums =
      normalize_grams<ROWS>(gram, valid, count, arguments.debiased, offsets, sums_scratch, inverse);
  sums.pivot_energy_x = energies[0];
  sums.pivot_energy_y = energies[1];
  const CkaResult result = cka_head(sums, count, arguments.debiased, arguments.distance);
  if (rank == 0 && threadIdx.x == 0) arguments.values[entry] = result.value;

  const float* kx = gram;
  const float* ky = gram + FLOATS / 2;
  if (layer.grad_x) {
    G* grad = static_cast<G*>(layer.grad_x) + batch * arguments.batch_grad_x + begin;
    x.gradient(kx, ky, result.own_x, result.other, inverse[0], valid, grad, layer.rows, width_x,
               layer.width_x);
  }
  if (layer.grad_y) {
    G* grad = static_cast<G*>(layer.grad_y) + batch * arguments.batch_grad_y + begin;
    y.gradient(ky, kx, result.own_y, result.other, inverse[1], valid, grad, layer.rows, width_y,
               layer.width_y);
  }
  // A block must not exit while another may still read its shared memory.
  if (CLUSTER) cluster_barrier();
}

// T: type of features; G: of gradients. blockIdx.y is the index of the entry.
template <typename T, typename G, int ROWS, bool CLUSTER>
__global__ void __launch_bounds__(CKA_SMALL_THREADS, 1)
    cka_small_kernel(const __grid_constant__ CkaSmallArguments arguments) {
  if constexpr (matches_architecture<CLUSTER>()) run_cka_small<T, G, ROWS, CLUSTER>(arguments);
}

}  // namespace rift
