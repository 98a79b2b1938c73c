// Arguments and shared memory layout of cka_small, for the kernel and its launcher.
#pragma once

#include "common/symmetric_tiles.h"

namespace rift {

constexpr int MAX_LAYERS = 24;
constexpr int MAX_ROWS = 128;
constexpr int CKA_SMALL_THREADS = 256;
// A row is padded by 16 bytes, so that the 8 rows that ldmatrix reads lie in different banks.
constexpr int PLANE_PADDING = 8;

struct CkaSmallLayer {
  const void *x, *y;          // (rows, width), strides in elements
  const unsigned char* mask;  // (rows), or null if all rows are valid
  void *grad_x, *grad_y;      // (rows, width) contiguous, or null if not wanted
  long long stride_xn, stride_xd, stride_yn, stride_yd;
  int rows, width_x, width_y;
};

// Passed by value: no table has to be uploaded, and a CUDA graph can replay the launch.
struct CkaSmallArguments {
  CkaSmallLayer layers[MAX_LAYERS];
  // A batch is one layer with these strides between its entries; else each entry is a layer.
  bool batched;
  long long batch_x, batch_y, batch_mask, batch_grad_x, batch_grad_y;
  bool debiased, distance;
  int block_columns;
  float* values;
  // Without clusters: memory through which blocks exchange data, and counters of their arrivals.
  float* workspace;
  unsigned* counters;
};

// Shared memory of a block: offsets in bytes from its start. Rows are rounded up to whole tiles.
struct CkaSmallLayout {
  int pitch;           // elements from one row of a plane to the next
  int plane;           // elements of each plane: x high, x low, y high, y low
  int gram;            // both Gram matrices in tiles; blocks exchange these first
  int pivot_energies;  // float[4]: energies about the first valid row
  int range;           // the elements that this block sums over all blocks
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

// Floats that a block passes to the others: partial Gram matrices, energies, its range of the sum.
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

// The smallest number of rows that the kernel is compiled for and that holds `rows`.
RIFT_HOST_DEVICE constexpr int padded_rows(int rows) {
  return rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
}

// Columns that each of `blocks` blocks owns, in whole tiles.
RIFT_HOST_DEVICE constexpr int columns_per_block(int width, int blocks) {
  const int columns = (width + blocks - 1) / blocks;
  return (columns + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

// A counter only grows, by the number of blocks at each barrier. So each number of blocks has
// counters of its own, one per entry.
constexpr int COUNTED_ENTRIES = 256;

RIFT_HOST_DEVICE constexpr int counter_at(int entry, int blocks) {
  int row = 0;
  while (1 << row < blocks) ++row;
  return row * COUNTED_ENTRIES + entry;
}

// The cluster size that every GPU with clusters supports. Without clusters, a group of blocks only
// has to be resident at once.
constexpr int LARGEST_CLUSTER = 8;
constexpr int LARGEST_GROUP = 16;

// How a GPU runs layers of some size.
struct CkaSmallPlan {
  bool cluster;       // the blocks of a layer are a cluster; else they use global memory
  int blocks;         // of a layer; 0: it needs more shared memory than they may have
  int block_columns;  // columns of a block
  int shared_bytes;   // of a block
  int entries;        // limit of one launch
  int workspace;      // floats of global memory for each entry
  int device;         // for which this plan was made
};

// `major`: of the compute capability; `shared_limit`: bytes of shared memory that a block may have.
RIFT_HOST_DEVICE constexpr CkaSmallPlan cka_small_plan(int rows, int width, int major,
                                                       int shared_limit, int processors) {
  const int padded = padded_rows(rows);
  // Without clusters, the blocks of a group wait for one another, one block on a multiprocessor.
  const int group = processors < LARGEST_GROUP ? processors : LARGEST_GROUP;
  const int limit = major >= 9 ? LARGEST_CLUSTER : group;
  // Each block owns at least one tile of columns; up to 8 blocks, and more only if the layer needs
  // their shared memory.
  for (int blocks = 1; blocks <= limit; blocks *= 2) {
    const bool splits =
        blocks < LARGEST_CLUSTER && 2 * blocks <= limit && width > blocks * TILE_ROWS;
    const int block_columns = columns_per_block(width, blocks);
    const int bytes = cka_small_layout(padded, block_columns, blocks).bytes;
    if (splits || bytes > shared_limit) continue;
    CkaSmallPlan plan{major >= 9, blocks, block_columns, bytes, 65535, 0, 0};
    if (!plan.cluster) {
      const int resident = processors / blocks;
      plan.entries = resident < COUNTED_ENTRIES ? resident : COUNTED_ENTRIES;
      plan.workspace = exchange_floats(padded, blocks) * blocks;
    }
    return plan;
  }
  return {};
}

}  // namespace rift
