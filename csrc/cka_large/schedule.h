// Who multiplies what: the tiles of [X Y]^T [X Y] on and above the diagonal, in squares of SIDE x SIDE
// tiles, cut into chunks of rows and dealt out to programs.
//
// Programs that run side by side should read the same rows, so that these come from memory once. So
// as many whole squares as there are for everybody go out first, chunk 0 to the last; each of the
// squares that are left is shared by `segments` programs, from the same chunks on, and programs that
// are over then share the squares' ends, one square after another (stream-K).
//
// What a program adds up from a square's first chunk on goes into the tiles' own slots, everything
// else into spill, by square and part. So everybody knows from arithmetic alone where the parts of a
// tile lie, and nobody waits: the next launch adds them up, in the order of the chunks.
#pragma once

#include "common/host_device.h"
#include "common/triangle.h"

namespace rift {

// Blocks of columns: rows and columns of a tile, of X or of Y.
struct MomentTile {
  bool left_is_y, right_is_y;
  int i, j;
};

// Chunks [first, last) of a square; `part`: the how manieth of the square.
struct Piece {
  int square, part, first, last;
};

struct Schedule {
  int blocks_x, blocks_y;  // of columns
  int chunks;              // of rows
  int programs;
  int side;      // tiles of a square
  int whole;     // squares that a program has for itself
  int segments;  // programs for each of the other squares
  int share;     // chunks of each of these
  int end;       // chunks of a square that the programs that are over share; 0: none

  RIFT_HOST_DEVICE constexpr int blocks() const { return blocks_x + blocks_y; }
  RIFT_HOST_DEVICE constexpr int tiles() const { return tile_count(blocks()); }
  RIFT_HOST_DEVICE constexpr int squares() const {
    return tile_count((blocks() + side - 1) / side);
  }
  RIFT_HOST_DEVICE constexpr int shared_squares() const { return squares() - whole * programs; }

  RIFT_HOST_DEVICE constexpr MomentTile tile(int slot) const {
    const TileCoord pair = tile_coord(slot);
    const bool left_is_y = pair.i >= blocks_x, right_is_y = pair.j >= blocks_x;
    return {left_is_y, right_is_y, pair.i - left_is_y * blocks_x, pair.j - right_is_y * blocks_x};
  }

  // The square that has the tile of these two blocks.
  RIFT_HOST_DEVICE constexpr int square_of(TileCoord tile) const {
    return tile_index(tile.i / side, tile.j / side);
  }

  // Parts of a square in spill: all but the one that begins with its first chunk.
  RIFT_HOST_DEVICE constexpr int spilled() const { return end ? segments + 1 : segments - 1; }
  RIFT_HOST_DEVICE constexpr int spill_squares() const { return shared_squares() * spilled(); }

  // The place in spill of a part of a square.
  RIFT_HOST_DEVICE constexpr int spill_index(int square, int part) const {
    return (square - whole * programs) * spilled() + part - 1;
  }

  RIFT_HOST_DEVICE constexpr int parts(int square) const {
    if (square < whole * programs) return 1;
    if (end == 0) return segments;
    const int first = (square - whole * programs) * end, run = end_run();
    return segments + (first + end - 1) / run - first / run + 1;
  }

  // Chunks of ends, one square after another, that one program has.
  RIFT_HOST_DEVICE constexpr int end_run() const {
    const int over = programs - segments * shared_squares();
    return (shared_squares() * end + over - 1) / over;
  }

  // The index-th piece of a program; none where first == last.
  RIFT_HOST_DEVICE constexpr Piece piece(int program, int index) const {
    if (index < whole) return {index * programs + program, 0, 0, chunks};
    index -= whole;
    const int begin = whole * programs, shared = shared_squares();
    constexpr Piece none{0, 0, 0, 0};
    if (program < segments * shared) {
      const int part = program / shared, first = part * share;
      const int last = first + share < chunks - end ? first + share : chunks - end;
      return index == 0 && first < last ? Piece{begin + program % shared, part, first, last} : none;
    }
    if (end == 0) return none;
    // In chunks of ends.
    const int run = end_run(), from = (program - segments * shared) * run, all = shared * end;
    const int to = from + run < all ? from + run : all, square = from / end + index;
    const int first = index == 0 ? from : square * end;
    const int last = (square + 1) * end < to ? (square + 1) * end : to;
    if (first >= last) return none;
    // As many parts as runs have begun in this square's end before this one.
    const int part = segments + first / run - square * end / run;
    const int offset = chunks - end - square * end;
    return {begin + square, part, first + offset, last + offset};
  }
};

// What a piece costs beside its chunks, in chunks: its part has to be stored and added up.
constexpr int PIECE_COST = 4;

RIFT_HOST_DEVICE constexpr Schedule make_schedule(int blocks_x, int blocks_y, int chunks,
                                                  int programs, int side) {
  Schedule schedule{blocks_x, blocks_y, chunks, programs, side, 0, 1, chunks, 0};
  schedule.whole = schedule.squares() / programs;
  const int shared = schedule.shared_squares();
  if (shared == 0) return schedule;
  schedule.segments = programs / shared;
  schedule.share = (chunks + schedule.segments - 1) / schedule.segments;
  // All programs busy to the end, if that saves more than its many short pieces cost.
  const int even = (shared * chunks + programs - 1) / programs;
  const int end = chunks - schedule.segments * even;
  if (end > 0 && even + PIECE_COST * (even / end + 1) < schedule.share) {
    schedule.share = even;
    schedule.end = end;
  } else {
    // None of them empty.
    schedule.segments = (chunks + schedule.share - 1) / schedule.share;
  }
  return schedule;
}

}  // namespace rift
