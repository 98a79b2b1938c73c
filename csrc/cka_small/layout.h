// Arguments and shared memory of cka_small, for the kernel, its launcher and a CPU.
#pragma once

#include "common/triangle.h"

namespace rift {

constexpr int MAX_LAYERS = 24;
constexpr int MAX_ROWS = 128;
constexpr int THREADS = 256;
// 16 bytes more than a row has, so that 8 rows below one another lie in all banks.
constexpr int PLANE_PADDING = 8;

struct CkaSmallLayer {
  const void *x, *y;          // (rows, width), strides in elements
  const unsigned char* mask;  // (rows), or null: all rows count
  void *grad_x, *grad_y;      // (rows, width) contiguous, or null: not wanted
  long long stride_xn, stride_xd, stride_yn, stride_yd;
  int rows, width_x, width_y;
};

// By value: no table to upload, nothing that a CUDA graph could not replay.
struct CkaSmallArguments {
  CkaSmallLayer layers[MAX_LAYERS];
  // A batch is one layer with these strides between its entries; otherwise each entry is a layer.
  bool batched;
  long long batch_x, batch_y, batch_mask, batch_grad_x, batch_grad_y;
  bool debiased, distance;
  int share;
  float* values;
  // Where there are no clusters: what blocks leave one another, and counters of their arrivals.
  float* workspace;
  unsigned* counters;
};

// Shared memory of one block, in bytes from its start; ROWS is rows in whole tiles.
struct CkaSmallLayout {
  int pitch;        // elements of a row of a plane
  int plane;        // elements of a plane: x high, x low, y high, y low
  int gram;         // both Gram matrices in tiles, what blocks exchange first
  int varies;       // float[4]: energies about the first row
  int range;        // this block's share of the sum over all blocks
  int sums;         // double[3][warps]
  int offsets;      // float[2][rows]
  int valid;        // char[rows]
  int bytes;
};

RIFT_BOTH constexpr int gram_floats(int rows) {
  return 2 * pair_count(rows / TILE_ROWS) * TILE_FLOATS;
}

RIFT_BOTH constexpr int gram_elements(int rows) {
  return 2 * pair_count(rows / TILE_ROWS) * TILE_ROWS * TILE_ROWS;
}

// Floats that a block leaves to the others: partial Gram matrices, energies, its range of the sum.
RIFT_BOTH constexpr int exchange_floats(int rows, int blocks) {
  return gram_floats(rows) + 4 + gram_elements(rows) / blocks;
}

RIFT_BOTH constexpr CkaSmallLayout cka_small_layout(int rows, int share, int blocks) {
  CkaSmallLayout at{};
  at.pitch = share + PLANE_PADDING;
  at.plane = rows * at.pitch;
  at.gram = 4 * at.plane * 2;
  at.varies = at.gram + gram_floats(rows) * 4;
  at.range = at.varies + 4 * 4;
  at.sums = at.range + gram_elements(rows) / blocks * 4;
  at.offsets = at.sums + 3 * THREADS / 32 * 8;
  at.valid = at.offsets + 2 * rows * 4;
  at.bytes = at.valid + rows;
  return at;
}

// Rows in the sizes that the kernel is compiled for.
RIFT_BOTH constexpr int padded_rows(int rows) {
  return rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
}

// The columns of one of `blocks` blocks: whole tiles.
RIFT_BOTH constexpr int share_of(int width, int blocks) {
  const int columns = (width + blocks - 1) / blocks;
  return (columns + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

// Counters only count on, by the number of blocks: one for each such number and each entry.
constexpr int COUNTED_ENTRIES = 256;

RIFT_BOTH constexpr int counter_at(int entry, int blocks) {
  int row = 0;
  while (1 << row < blocks) ++row;
  return row * COUNTED_ENTRIES + entry;
}

// What every GPU with clusters grants; without them, blocks only have to run at once.
constexpr int LARGEST_CLUSTER = 8;
constexpr int LARGEST_GROUP = 16;

// How a GPU runs layers of some size.
struct CkaSmallPlan {
  bool cluster;      // blocks of a layer meet in a cluster, or through global memory
  int blocks;        // of one layer; 0: the shared memory of so many does not hold it
  int share;         // columns of a block
  int shared_bytes;  // of a block
  int entries;       // that one launch may have
  int workspace;     // floats that an entry needs in global memory
  int device;        // whose plan this is
};

// `major`: of the compute capability; `shared`: bytes that a block may have at most.
RIFT_BOTH constexpr CkaSmallPlan cka_small_plan(int rows, int width, int major, int shared,
                                                int processors) {
  const int padded = padded_rows(rows);
  // Without clusters, blocks that wait for one another run at once, one on a processor.
  const int group = processors < LARGEST_GROUP ? processors : LARGEST_GROUP;
  const int most = major >= 9 ? LARGEST_CLUSTER : group;
  // One tile of columns a block at least; 8 blocks, more only if need be.
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const bool splits =
        blocks < LARGEST_CLUSTER && 2 * blocks <= most && width > blocks * TILE_ROWS;
    const int share = share_of(width, blocks), bytes = cka_small_layout(padded, share, blocks).bytes;
    if (splits || bytes > shared) continue;
    if (major >= 9) return {true, blocks, share, bytes, 65535, 0, 0};
    const int entries = processors / blocks;
    return {false, blocks, share, bytes, entries < COUNTED_ENTRIES ? entries : COUNTED_ENTRIES,
            exchange_floats(padded, blocks) * blocks, 0};
  }
  return {};
}

}  // namespace rift
