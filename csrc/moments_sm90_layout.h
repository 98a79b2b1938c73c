// Sizes and arguments of moments_sm90, for the kernel, its launcher and a CPU.
#pragma once

#include "schedule.h"

namespace rift {

constexpr int MOMENT_BLOCK = 128;  // columns of a tile's either side
constexpr int MOMENT_CHUNK = 64;   // rows
constexpr int MOMENT_TILE = MOMENT_BLOCK * MOMENT_BLOCK;
constexpr int MOMENT_STAGES = 6;
// Two warpgroups multiply, one fetches.
constexpr int MOMENT_THREADS = 3 * 128;
// What the copy engine swizzles: rows of 128 bytes.
constexpr int BOX_COLUMNS = 64;
constexpr int BOX_BYTES = MOMENT_CHUNK * BOX_COLUMNS * 2;
constexpr int OPERAND_BYTES = MOMENT_BLOCK / BOX_COLUMNS * BOX_BYTES;
constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;
// Stages, two barriers for each, and room to begin at a multiple of 1024.
constexpr int MOMENT_SHARED = 1024 + MOMENT_STAGES * (STAGE_BYTES + 2 * 8);

struct MomentsArguments {
  Schedule schedule;
  float* tiles;  // MOMENT_TILE for each tile: its part that begins with the first chunk
  float* spill;  // MOMENT_TILE for each program: what it began in the middle of a tile
};

RIFT_BOTH constexpr bool on_diagonal(const MomentTile& tile) {
  return tile.left_is_y == tile.right_is_y && tile.i == tile.j;
}

RIFT_BOTH constexpr Schedule moments_schedule(int rows, int width_x, int width_y, int programs) {
  return {(width_x + MOMENT_BLOCK - 1) / MOMENT_BLOCK, (width_y + MOMENT_BLOCK - 1) / MOMENT_BLOCK,
          (rows + MOMENT_CHUNK - 1) / MOMENT_CHUNK, programs};
}

}  // namespace rift
