// Sizes and arguments of moments_sm80 and moments_sm90, for kernels and launchers.
#pragma once

#include "cka_large/schedule.h"

namespace rift {

constexpr int MOMENT_BLOCK = 128;  // rows and columns of a tile
constexpr int MOMENT_CHUNK = 64;   // rows of features
constexpr int MOMENT_TILE = MOMENT_BLOCK * MOMENT_BLOCK;
// Each block of a cluster computes half the rows of a square of 2 x 2 tiles.
constexpr int CLUSTER_SIZE = 2;
constexpr int MOMENT_STAGES = 4;
// A producer warpgroup and two consumer warpgroups.
constexpr int MOMENT_THREADS = 3 * 128;
// The copy engine swizzles rows of 128 bytes.
constexpr int BOX_COLUMNS = 64;
constexpr int BOX_BYTES = MOMENT_CHUNK * BOX_COLUMNS * 2;
// 128 columns of a chunk.
constexpr int OPERAND_BYTES = MOMENT_BLOCK / BOX_COLUMNS * BOX_BYTES;
// 128 columns of the left operand, which are the block's own, and all 256 of the right operand.
constexpr int STAGE_BYTES = (1 + CLUSTER_SIZE) * OPERAND_BYTES;
// Stages, two barriers for each, and padding that aligns the stages to 1024 bytes.
constexpr int MOMENT_SHARED = 1024 + MOMENT_STAGES * (STAGE_BYTES + 2 * 8);

// The number of rows that can be left out, and the rows of the patches that replace their chunks.
constexpr int MAX_LONG_ROWS = 8;
constexpr int PATCH_ROWS = MAX_LONG_ROWS * MOMENT_CHUNK;

struct MomentsArguments {
  Schedule schedule;
  float* tiles;  // [tiles][MOMENT_TILE]: the part of each tile that begins with chunk 0
  float* spill;  // [spill_squares][square_side][square_side][MOMENT_TILE]: see Schedule
  // Rows to leave out, or -1; null if there are none.
  const int* long_rows;
  // [2][PATCH_ROWS][patch_width]: for X and Y, the chunk of each of these rows without them.
  const unsigned short* patches;
  int patch_width;

  // Index of the patch that replaces a chunk, or -1.
  RIFT_HOST_DEVICE int patch_index(int chunk) const {
    int patch = -1;
    for (int s = MAX_LONG_ROWS - 1; long_rows && s >= 0; --s) {
      if (long_rows[s] >= 0 && long_rows[s] / MOMENT_CHUNK == chunk) patch = s;
    }
    return patch;
  }

  // Address of a part of a tile, which is given by its blocks of columns.
  RIFT_HOST_DEVICE constexpr float* part_address(TileCoord tile, int square, int part) const {
    if (part == 0) return tiles + static_cast<long long>(tile_index(tile.i, tile.j)) * MOMENT_TILE;
    const int side = schedule.square_side;
    const int tile_in_square = tile.i % side * side + tile.j % side;
    const long long position =
        1LL * schedule.spill_index(square, part) * side * side + tile_in_square;
    return spill + position * MOMENT_TILE;
  }
};

// `hopper`: programs are clusters that compute squares, else blocks that compute single tiles.
RIFT_HOST_DEVICE constexpr Schedule moments_schedule(int rows, int width_x, int width_y,
                                                     int processors, bool hopper) {
  const int programs = hopper ? processors / CLUSTER_SIZE : processors;
  return make_schedule((width_x + MOMENT_BLOCK - 1) / MOMENT_BLOCK,
                       (width_y + MOMENT_BLOCK - 1) / MOMENT_BLOCK,
                       (rows + MOMENT_CHUNK - 1) / MOMENT_CHUNK, programs > 0 ? programs : 1,
                       hopper ? CLUSTER_SIZE : 1);
}

// Size of the spill memory.
RIFT_HOST_DEVICE constexpr long long spill_floats(const Schedule& schedule) {
  return 1LL * schedule.spill_squares() * schedule.square_side * schedule.square_side * MOMENT_TILE;
}

}  // namespace rift
