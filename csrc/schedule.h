// Who multiplies what: the tiles of [X Y]^T [X Y] on and above the diagonal, cut into chunks of rows
// and dealt out evenly to programs, whatever the number of tiles (stream-K).
//
// A program owns a run of (tile, chunk) pairs, tile by tile. What it adds up for a tile whose first
// chunk it has goes into the tile's slot, for its first tile, begun in the middle, into the
// program's own spill. So everybody knows from arithmetic alone where the parts of a tile lie, and
// nobody waits: the next launch adds them up, in the order of the chunks.
#pragma once

#include "both.h"
#include "triangle.h"

namespace rift {

// A tile's rows are columns of X or Y, and so are its columns.
struct MomentTile {
  bool left_is_y, right_is_y;
  int i, j;
};

struct Piece {
  int slot, first, last;  // chunks [first, last) of a tile
};

struct Schedule {
  int blocks_x, blocks_y;  // of columns
  int chunks;              // of rows
  int programs;

  // In the order XX (upper), YY (upper), XY.
  RIFT_BOTH constexpr int tiles() const {
    return pair_count(blocks_x) + pair_count(blocks_y) + blocks_x * blocks_y;
  }

  // Pairs of a program; the last ones may have fewer, or none.
  RIFT_BOTH constexpr int share() const { return (tiles() * chunks + programs - 1) / programs; }

  RIFT_BOTH constexpr MomentTile tile(int slot) const {
    const int in_y = slot - pair_count(blocks_x), in_xy = in_y - pair_count(blocks_y);
    if (in_y < 0) return {false, false, pair_at(slot).i, pair_at(slot).j};
    if (in_xy < 0) return {true, true, pair_at(in_y).i, pair_at(in_y).j};
    return {false, true, in_xy / blocks_y, in_xy % blocks_y};
  }

  RIFT_BOTH constexpr int begin(int program) const {
    const int all = tiles() * chunks, at = program * share();
    return at < all ? at : all;
  }

  // What a program does next, having come to pair `at` < begin(program + 1).
  RIFT_BOTH constexpr Piece piece(int program, int at) const {
    const int slot = at / chunks, first = at % chunks, left = begin(program + 1) - at;
    return {slot, first, left < chunks - first ? first + left : chunks};
  }
};

}  // namespace rift
