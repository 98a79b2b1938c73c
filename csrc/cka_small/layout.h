// Arguments and shared memory layout of cka_small, for the kernel and its launcher.
#pragma once

#include "common/symmetric_tiles.h"

namespace rift {

constexpr int MAX_LAYERS = 24;
constexpr int MAX_ROWS = 128;
constexpr int CKA_SMALL_THREADS = 256;
constexpr int CKA_SMALL_WARPS = CKA_SMALL_THREADS / 32;
// A tile of 16 x 16 floats, in the order in which a warp's products leave them: lane l has 4 of the
// left half at 4 l, and 4 of the right half at 128 + 4 l.
constexpr int TILE_FLOATS = TILE_ROWS * TILE_ROWS;

// Student or teacher.
struct CkaSmallSide {
  const void* features;  // (rows, width), strides in elements
  void* grad;            // (rows, width) contiguous, or null if not wanted
  long long stride_n, stride_d;
  int width;
};

struct CkaSmallLayer {
  CkaSmallSide sides[2];
  const unsigned char* mask;  // (rows), or null if all rows are valid
  int rows;
};

// Passed by value: no table has to be uploaded, and a CUDA graph can replay the launch.
struct CkaSmallArguments {
  CkaSmallLayer layers[MAX_LAYERS];
  // A batch is one layer with these strides between its entries; else each entry is a layer.
  bool batched;
  long long batch_features[2], batch_grads[2], batch_mask;
  bool debiased, distance;
  int block_columns;
  float* values;
  // Without clusters: memory through which blocks exchange data, and counters of their arrivals.
  float* workspace;
  unsigned* counters;
};

// What a block lets the others of its group write and read: offsets in floats. Tiles are numbered
// through both matrices; block `tile % blocks` of the group owns a tile, as its tile
// `tile / blocks`. At 0 lies each owned tile, as each block of the group has computed it.
struct ExchangeLayout {
  int owned;     // tiles that a block owns, at most
  int sums;      // each owned tile, summed over the blocks
  int row_sums;  // [side][tile column][row]: sums of the tiles' rows, without the diagonal
  int diagonal;  // [side][row]
  int floats;
};

RIFT_HOST_DEVICE constexpr int gram_tiles(int rows) { return 2 * tile_count(rows / TILE_ROWS); }

// Groups have 2^log2_blocks blocks, which saves the kernel divisions.
RIFT_HOST_DEVICE constexpr ExchangeLayout exchange_layout(int rows, int log2_blocks) {
  ExchangeLayout layout{};
  const int blocks = 1 << log2_blocks;
  layout.owned = (gram_tiles(rows) + blocks - 1) >> log2_blocks;
  layout.sums = layout.owned * blocks * TILE_FLOATS;
  layout.row_sums = layout.sums + layout.owned * TILE_FLOATS;
  layout.diagonal = layout.row_sums + 2 * rows * rows / TILE_ROWS;
  layout.floats = layout.diagonal + 2 * rows;
  return layout;
}

// Shared memory of 16 columns of one side; see features.cuh. Rows are rounded up to whole tiles.
RIFT_HOST_DEVICE constexpr int unit_bytes(int rows) { return 2 * rows * TILE_ROWS * 2 + 16; }

// Shared memory of a block: offsets in bytes from its start.
struct CkaSmallLayout {
  int side;      // bytes of one side's features, of which both lie at 0
  int exchange;  // of a cluster; then, in any group, the matrices that the gradients need
  int scratch;   // SCRATCH_BYTES
  int bytes;
};

// Scratch: 16 means of each warp, or some sums of it.
constexpr int SCRATCH_BYTES = CKA_SMALL_WARPS * TILE_ROWS * 4;

RIFT_HOST_DEVICE constexpr CkaSmallLayout cka_small_layout(int rows, int block_columns,
                                                           int log2_blocks, bool cluster) {
  CkaSmallLayout layout{};
  layout.side = block_columns / TILE_ROWS * unit_bytes(rows);
  layout.exchange = 2 * layout.side;
  layout.scratch = layout.exchange + 4 * (cluster ? exchange_layout(rows, log2_blocks).floats
                                                  : gram_tiles(rows) * TILE_FLOATS);
  layout.bytes = layout.scratch + SCRATCH_BYTES;
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

RIFT_HOST_DEVICE constexpr int counter_at(int entry, int log2_blocks) {
  return log2_blocks * COUNTED_ENTRIES + entry;
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
  for (int log2_blocks = 0; 1 << log2_blocks <= limit; ++log2_blocks) {
    const int blocks = 1 << log2_blocks;
    const bool splits =
        blocks < LARGEST_CLUSTER && 2 * blocks <= limit && width > blocks * TILE_ROWS;
    const int block_columns = columns_per_block(width, blocks);
    const int bytes = cka_small_layout(padded, block_columns, log2_blocks, major >= 9).bytes;
    if (splits || bytes > shared_limit) continue;
    CkaSmallPlan plan{major >= 9, blocks, block_columns, bytes, 65535, 0, 0};
    if (!plan.cluster) {
      const int resident = processors / blocks;
      plan.entries = resident < COUNTED_ENTRIES ? resident : COUNTED_ENTRIES;
      plan.workspace = exchange_layout(padded, log2_blocks).floats * blocks;
    }
    return plan;
  }
  return {};
}

}  // namespace rift
