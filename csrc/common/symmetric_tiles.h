// A symmetric matrix stored as the 16 x 16 tiles on and above its diagonal.
#pragma once

#include "common/host_device.h"

namespace rift {

constexpr int TILE_ROWS = 16;
// A row is padded by one float, so that a column of a tile lies in 16 different banks.
constexpr int TILE_PITCH = TILE_ROWS + 1;
constexpr int TILE_FLOATS = TILE_ROWS * TILE_PITCH;

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

// Offset of element (row, column) or, below the diagonal, of its mirror image.
RIFT_HOST_DEVICE constexpr int element_offset(int row, int column) {
  const int i = row < column ? row : column, j = row < column ? column : row;
  return tile_index(i / TILE_ROWS, j / TILE_ROWS) * TILE_FLOATS + i % TILE_ROWS * TILE_PITCH +
         j % TILE_ROWS;
}

// How often a stored element counts in a sum over the matrix. It stands for its mirror image as
// well; tiles on the diagonal also store that image, which counts 0 times.
RIFT_HOST_DEVICE constexpr int multiplicity(int row, int column) {
  if (row / TILE_ROWS != column / TILE_ROWS) return 2;
  return row == column ? 1 : row < column ? 2 : 0;
}

struct Element {
  int row, column, offset;
};

// The element with this index among those of all tiles, numbered tile by tile.
RIFT_HOST_DEVICE constexpr Element element_at(int index) {
  const TileCoord pair = tile_coord(index / (TILE_ROWS * TILE_ROWS));
  const int row = index / TILE_ROWS % TILE_ROWS, column = index % TILE_ROWS;
  return {pair.i * TILE_ROWS + row, pair.j * TILE_ROWS + column,
          index / (TILE_ROWS * TILE_ROWS) * TILE_FLOATS + row * TILE_PITCH + column};
}

}  // namespace rift
