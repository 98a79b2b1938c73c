// A symmetric matrix stored as the 16 x 16 tiles on and above its diagonal.
#pragma once

#include "common/host_device.h"

namespace rift {

constexpr int TILE_ROWS = 16;

// Row and column of a tile within the matrix of tiles.
struct TileCoord {
  int i, j;
};

// Index of tile (i, j), i <= j; tiles are numbered column by column.
RIFT_HOST_DEVICE constexpr int tile_index(int i, int j) { return j * (j + 1) / 2 + i; }

RIFT_HOST_DEVICE constexpr int tile_count(int tiles) { return tile_index(0, tiles); }

RIFT_HOST_DEVICE constexpr TileCoord tile_coord(int index) {
  int j = 0;
  while (tile_index(0, j + 1) <= index) ++j;
  return {index - tile_index(0, j), j};
}

}  // namespace rift
