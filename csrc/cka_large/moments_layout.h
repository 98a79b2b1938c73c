// Sizes and arguments of moments_sm80 and moments_sm90, for kernels, launchers and a CPU.
#pragma once

#include "cka_large/schedule.h"

namespace rift {

constexpr int MOMENT_BLOCK = 128;  // columns of a tile's either side
constexpr int MOMENT_CHUNK = 64;   // rows
constexpr int MOMENT_TILE = MOMENT_BLOCK * MOMENT_BLOCK;
// Blocks of a cluster: each has half the rows of a square of 2 x 2 tiles.
constexpr int CLUSTER_SIZE = 2;
constexpr int MOMENT_STAGES = 4;
// Two warpgroups multiply, one fetches.
constexpr int MOMENT_THREADS = 3 * 128;
// What the copy engine swizzles: rows of 128 bytes.
constexpr int BOX_COLUMNS = 64;
constexpr int BOX_BYTES = MOMENT_CHUNK * BOX_COLUMNS * 2;
// 128 columns of a chunk.
constexpr int OPERAND_BYTES = MOMENT_BLOCK / BOX_COLUMNS * BOX_BYTES;
// A block's own 128 columns of the left operand, and all 256 of the right one.
constexpr int STAGE_BYTES = (1 + CLUSTER_SIZE) * OPERAND_BYTES;
// Stages, two barriers for each, and room to begin at a multiple of 1024.
constexpr int MOMENT_SHARED = 1024 + MOMENT_STAGES * (STAGE_BYTES + 2 * 8);

// Rows that may be left out, and rows of the chunks that have them.
constexpr int MAX_LONG_ROWS = 8;
constexpr int PATCH_ROWS = MAX_LONG_ROWS * MOMENT_CHUNK;

struct MomentsArguments {
  Schedule schedule;
  float* tiles;  // MOMENT_TILE for each tile: its part that begins with the first chunk
  float* spill;  // side x side x MOMENT_TILE for each place in spill: see Schedule
  // Rows to leave out, or -1, and the chunk of each without them, X before Y; null: none.
  const int* long_rows;
  const unsigned short* patches;
  int patch_width;

  // The patch that takes the place of a chunk, or -1.
  RIFT_HOST_DEVICE int patch_index(int chunk) const {
    int patch = -1;
    for (int s = MAX_LONG_ROWS - 1; long_rows && s >= 0; --s) {
      if (long_rows[s] >= 0 && long_rows[s] / MOMENT_CHUNK == chunk) patch = s;
    }
    return patch;
  }

  // Where a part of a tile goes, by its blocks of columns.
  RIFT_HOST_DEVICE constexpr float* part_address(TileCoord tile, int square, int part) const {
    if (part == 0) return tiles + static_cast<long long>(tile_index(tile.i, tile.j)) * MOMENT_TILE;
    const int side = schedule.side, within = tile.i % side * side + tile.j % side;
    const long long place = 1LL * schedule.spill_index(square, part) * side * side + within;
    return spill + place * MOMENT_TILE;
  }
};

// Of clusters, or of single blocks.
RIFT_HOST_DEVICE constexpr Schedule moments_schedule(int rows, int width_x, int width_y,
                                                     int processors, bool pairs) {
  const int programs = pairs ? processors / CLUSTER_SIZE : processors;
  return make_schedule((width_x + MOMENT_BLOCK - 1) / MOMENT_BLOCK,
                       (width_y + MOMENT_BLOCK - 1) / MOMENT_BLOCK,
                       (rows + MOMENT_CHUNK - 1) / MOMENT_CHUNK, programs > 0 ? programs : 1,
                       pairs ? CLUSTER_SIZE : 1);
}

// Floats of spill.
RIFT_HOST_DEVICE constexpr long long spill_floats(const Schedule& schedule) {
  return 1LL * schedule.spill_squares() * schedule.side * schedule.side * MOMENT_TILE;
}

}  // namespace rift
