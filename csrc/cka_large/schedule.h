// Work distribution of the moments (stream-K). The tiles of [X Y]^T [X Y] on and above the diagonal
// form squares of square_side x square_side tiles. Squares are cut into chunks of rows and dealt
// out to programs: blocks or clusters.
//
// Programs that run at the same time should read the same rows, so that these come from DRAM once.
// So each program first gets whole squares, as many as there are for every program, from chunk 0 to
// the last. Each remaining square is shared by `segments` programs, which begin at the same chunks
// in all of these squares. Idle programs then share the tails of these squares, one square after
// another.
//
// The part of a square that begins with chunk 0 goes into the slots of its tiles. All other parts
// go into spill memory, by square and part. So arithmetic alone tells where the parts of a tile
// lie, and no program waits for another: the next launch sums them in the order of their chunks.
#pragma once

#include "common/host_device.h"
#include "common/symmetric_tiles.h"

namespace rift {

// Blocks of columns of X or Y that are the rows and the columns of a tile.
struct MomentTile {
  bool left_is_y, right_is_y;
  int i, j;
};

// Chunks [begin, end) of a square; `part` is the index of this piece within its square.
struct Piece {
  int square, part, begin, end;
};

struct Schedule {
  int blocks_x, blocks_y;  // blocks of columns
  int chunks;              // chunks of rows
  int programs;
  int square_side;     // in tiles
  int whole_squares;   // for each program
  int segments;        // programs for each remaining square
  int segment_chunks;  // chunks of each segment
  int tail;            // chunks of a remaining square that idle programs share; 0: none

  RIFT_HOST_DEVICE constexpr int blocks() const { return blocks_x + blocks_y; }
  RIFT_HOST_DEVICE constexpr int tiles() const { return tile_count(blocks()); }
  RIFT_HOST_DEVICE constexpr int squares() const {
    return tile_count((blocks() + square_side - 1) / square_side);
  }
  RIFT_HOST_DEVICE constexpr int shared_squares() const {
    return squares() - whole_squares * programs;
  }

  RIFT_HOST_DEVICE constexpr MomentTile tile(int slot) const {
    const TileCoord coord = tile_coord(slot);
    const bool left_is_y = coord.i >= blocks_x, right_is_y = coord.j >= blocks_x;
    return {left_is_y, right_is_y, coord.i - left_is_y * blocks_x, coord.j - right_is_y * blocks_x};
  }

  // The square that contains a tile.
  RIFT_HOST_DEVICE constexpr int square_of(TileCoord tile) const {
    return tile_index(tile.i / square_side, tile.j / square_side);
  }

  // Parts of a shared square in spill memory: all but the one that begins with chunk 0.
  RIFT_HOST_DEVICE constexpr int spilled_parts() const {
    return tail ? segments + 1 : segments - 1;
  }
  RIFT_HOST_DEVICE constexpr int spill_squares() const {
    return shared_squares() * spilled_parts();
  }

  // Position of a part of a square in spill memory.
  RIFT_HOST_DEVICE constexpr int spill_index(int square, int part) const {
    return (square - whole_squares * programs) * spilled_parts() + part - 1;
  }

  RIFT_HOST_DEVICE constexpr int parts(int square) const {
    if (square < whole_squares * programs) return 1;
    if (tail == 0) return segments;
    const int first = (square - whole_squares * programs) * tail, run = tail_run();
    return segments + (first + tail - 1) / run - first / run + 1;
  }

  // Chunks of tails, one square after another, that each idle program gets.
  RIFT_HOST_DEVICE constexpr int tail_run() const {
    const int idle = programs - segments * shared_squares();
    return (shared_squares() * tail + idle - 1) / idle;
  }

  // A program's piece with this index; begin == end if there is none.
  RIFT_HOST_DEVICE constexpr Piece piece(int program, int index) const {
    if (index < whole_squares) return {index * programs + program, 0, 0, chunks};
    index -= whole_squares;
    const int first_shared = whole_squares * programs, shared = shared_squares();
    constexpr Piece none{0, 0, 0, 0};
    if (program < segments * shared) {
      const int part = program / shared, begin = part * segment_chunks;
      const int end =
          begin + segment_chunks < chunks - tail ? begin + segment_chunks : chunks - tail;
      return index == 0 && begin < end ? Piece{first_shared + program % shared, part, begin, end}
                                       : none;
    }
    if (tail == 0) return none;
    // Positions among the chunks of all tails.
    const int run = tail_run(), run_begin = (program - segments * shared) * run;
    const int tail_chunks = shared * tail;
    const int run_end = run_begin + run < tail_chunks ? run_begin + run : tail_chunks;
    const int square = run_begin / tail + index;
    const int begin = index == 0 ? run_begin : square * tail;
    const int end = (square + 1) * tail < run_end ? (square + 1) * tail : run_end;
    if (begin >= end) return none;
    // Every run that began earlier in this square's tail is a part as well.
    const int part = segments + begin / run - square * tail / run;
    const int offset = chunks - tail - square * tail;
    return {first_shared + square, part, begin + offset, end + offset};
  }
};

// Cost of a piece besides its chunks, in chunks: its part has to be stored and summed.
constexpr int PIECE_COST = 4;

RIFT_HOST_DEVICE constexpr Schedule make_schedule(int blocks_x, int blocks_y, int chunks,
                                                  int programs, int square_side) {
  Schedule schedule{blocks_x, blocks_y, chunks, programs, square_side, 0, 1, chunks, 0};
  schedule.whole_squares = schedule.squares() / programs;
  const int shared = schedule.shared_squares();
  if (shared == 0) return schedule;
  schedule.segments = programs / shared;
  schedule.segment_chunks = (chunks + schedule.segments - 1) / schedule.segments;
  // Keeps all programs busy to the end if that saves more than the many short pieces cost.
  const int even = (shared * chunks + programs - 1) / programs;
  const int tail = chunks - schedule.segments * even;
  if (tail > 0 && even + PIECE_COST * (even / tail + 1) < schedule.segment_chunks) {
    schedule.segment_chunks = even;
    schedule.tail = tail;
  } else {
    // Drops empty segments.
    schedule.segments = (chunks + schedule.segment_chunks - 1) / schedule.segment_chunks;
  }
  return schedule;
}

}  // namespace rift
