// Arguments and shared memory of cka_small, for the kernel, its launcher and a CPU.
#pragma once

#include "common/triangle.h"

namespace rift {

constexpr int MAX_LAYERS = 24;
constexpr int MAX_ROWS = 128;
constexpr int CKA_SMALL_THREADS = 256;
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
  int block_columns;
  float* values;
  // Where there are no clusters: what blocks leave one another, and counters of their arrivals.
  float* workspace;
  unsigned* counters;
};

// Shared memory of one block, in bytes from its start; ROWS is rows in whole tiles.
struct CkaSmallLayout {
  int pitch;           // elements of a row of a plane
  int plane;           // elements of a plane: x high, x low, y high, y low
  int gram;            // both Gram matrices in tiles, what blocks exchange first
  int pivot_energies;  // float[4]: energies about the first row
  int range;           // this block's share of the sum over all blocks
  int sums;            // double[3][warps]
  int offsets;         // float[2][rows]
  int valid;           // char[rows]
  int bytes;
};

RIFT_HOST_DEVICE constexpr int gram_floats(int rows) {
  return 2 * tile_count(rows / TILE_ROWS) * TILE_FLOATS;
}

RIFT_HOST_DEVICE constexpr int gram_elements(int rows) {
  return 2 * tile_count(rows / TILE_ROWS) * TILE_ROWS * TILE_ROWS;
}

// Floats that a block leaves to the others: partial Gram matrices, energies, its range of the sum.
RIFT_HOST_DEVICE constexpr int exchange_floats(int rows, int blocks) {
  return gram_floats(rows) + 4 + gram_elements(rows) / blocks;
}

RIFT_HOST_DEVICE constexpr CkaSmallLayout cka_small_layout(int rows, int block_columns,
                                                           int blocks) {
  CkaSmallLayout layout{};
  layout.pitch = block_columns + PLANE_PADDING;
  layout.plane = rows * layout.pitch;
  layout.gram = 4 * layout.plane * 2;
  layout.pivot_energies = layout.gram + gram_floats(rows) * 4;
  layout.range = layout.pivot_energies + 4 * 4;
  layout.sums = layout.range + gram_elements(rows) / blocks * 4;
  layout.offsets = layout.sums + 3 * CKA_SMALL_THREADS / 32 * 8;
  layout.valid = layout.offsets + 2 * rows * 4;
  layout.bytes = layout.valid + rows;
  return layout;
}

// Rows in the sizes that the kernel is compiled for.
RIFT_HOST_DEVICE constexpr int padded_rows(int rows) {
  return rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
}

// The columns of one of `blocks` blocks: whole tiles.
RIFT_HOST_DEVICE constexpr int columns_per_block(int width, int blocks) {
  const int columns = (width + blocks - 1) / blocks;
  return (columns + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

// Counters only count on, by the number of blocks: one for each such number and each entry.
constexpr int COUNTED_ENTRIES = 256;

RIFT_HOST_DEVICE constexpr int counter_at(int entry, int blocks) {
  int row = 0;
  while (1 << row < blocks) ++row;
  return row * COUNTED_ENTRIES + entry;
}

// What every GPU with clusters grants; without them, blocks only have to run at once.
constexpr int LARGEST_CLUSTER = 8;
constexpr int LARGEST_GROUP = 16;

// How a GPU runs layers of some size.
struct CkaSmallPlan {
  bool cluster;       // blocks of a layer meet in a cluster, or through global memory
  int blocks;         // of one layer; 0: the shared memory of so many does not hold it
  int block_columns;  // columns of a block
  int shared_bytes;   // of a block
  int entries;        // that one launch may have
  int workspace;      // floats that an entry needs in global memory
  int device;         // whose plan this is
};

// `major`: of the compute capability; `shared`: bytes that a block may have at most.
RIFT_HOST_DEVICE constexpr CkaSmallPlan cka_small_plan(int rows, int width, int major, int shared,
                                                       int processors) {
  const int padded = padded_rows(rows);
  // Without clusters, blocks that wait for one another run at once, one on a processor.
  const int group = processors < LARGEST_GROUP ? processors : LARGEST_GROUP;
  const int limit = major >= 9 ? LARGEST_CLUSTER : group;
  // One tile of columns a block at least; 8 blocks, more only if need be.
  for (int blocks = 1; blocks <= limit; blocks *= 2) {
    const bool splits =
        blocks < LARGEST_CLUSTER && 2 * blocks <= limit && width > blocks * TILE_ROWS;
    const int block_columns = columns_per_block(width, blocks),
              bytes = cka_small_layout(padded, block_columns, blocks).bytes;
    if (splits || bytes > shared) continue;
    if (major >= 9) return {true, blocks, block_columns, bytes, 65535, 0, 0};
    const int entries = processors / blocks;
    return {false,
            blocks,
            block_columns,
            bytes,
            entries < COUNTED_ENTRIES ? entries : COUNTED_ENTRIES,
            exchange_floats(padded, blocks) * blocks,
            0};
  }
  return {};
}

}  // namespace rift
