// A symmetric matrix of ROWS x ROWS as the 16 x 16 tiles on and above its diagonal.
#pragma once

#include "common/host_device.h"

namespace rift {

constexpr int TILE_ROWS = 16;
// One float more than a row has, so that a column of a tile lies in 16 different banks.
constexpr int TILE_PITCH = TILE_ROWS + 1;
constexpr int TILE_FLOATS = TILE_ROWS * TILE_PITCH;

struct Pair {
  int i, j;
};

// Tiles (i, j), i <= j, column by column.
RIFT_BOTH constexpr int pair_index(int i, int j) { return j * (j + 1) / 2 + i; }

RIFT_BOTH constexpr int pair_count(int tiles) { return pair_index(0, tiles); }

RIFT_BOTH constexpr Pair pair_at(int index) {
  int j = 0;
  while (pair_index(0, j + 1) <= index) ++j;
  return {index - pair_index(0, j), j};
}

// Where element (row, column) lies, or its mirror image: below the diagonal there is nothing.
RIFT_BOTH constexpr int element_at(int row, int column) {
  const int i = row < column ? row : column, j = row < column ? column : row;
  return pair_index(i / TILE_ROWS, j / TILE_ROWS) * TILE_FLOATS + i % TILE_ROWS * TILE_PITCH +
         j % TILE_ROWS;
}

// How often an element counts in a sum over the matrix: with its mirror image, which tiles on the
// diagonal hold, too, and nobody reads.
RIFT_BOTH constexpr int times_of(int row, int column) {
  if (row / TILE_ROWS != column / TILE_ROWS) return 2;
  return row == column ? 1 : row < column ? 2 : 0;
}

struct Element {
  int row, column, offset;
};

// The index-th of pair_count(tiles) * 256 elements of all tiles, tile by tile.
RIFT_BOTH constexpr Element element(int index) {
  const Pair pair = pair_at(index / (TILE_ROWS * TILE_ROWS));
  const int row = index / TILE_ROWS % TILE_ROWS, column = index % TILE_ROWS;
  return {pair.i * TILE_ROWS + row, pair.j * TILE_ROWS + column,
          index / (TILE_ROWS * TILE_ROWS) * TILE_FLOATS + row * TILE_PITCH + column};
}

}  // namespace rift
