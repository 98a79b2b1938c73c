// One pass over all rows, centered about the means of R: their energies, their products with the
// long rows S, the sums of their products with all other rows, k and l, and the columns of R
// weighted with these sums. About the means of R, the rows of R add up to 0. So the row sums take
// no pass of their own:
//
//   k_i = sum over s in S of x_i x_s, without s = i, minus x_i x_i if i is in R
//
// A block owns a run of rows. Its threads own vectors of columns, the same ones of X and Y. If they
// are more than the vectors, they form teams that process different rows. A row's features stay in
// registers until its sums are known, which weight its columns. Features of more than 4096 columns
// are read again for that, and so are those beside long rows, whose products take the registers.
//
// Memory traffic: the features once; 16 bytes for each row, 80 with long rows.
#pragma once

#include "cka_large/long_rows.cuh"
#include "common/reduce.cuh"

namespace rift {

constexpr int ROW_THREADS = 512;
constexpr int ROW_WARPS = ROW_THREADS / 32;
constexpr int ROWS_AT_ONCE = 2;  // of a thread
constexpr int ROW_SLOTS = 2;  // a slot is free as soon as it has been read
using RowStream = FeatureStream<ROW_THREADS, ROWS_AT_ONCE, ROW_SLOTS>;

struct RowScratch {
  unsigned char stream[RowStream::BYTES];
  // Sums over the threads of a warp. Of two rounds, so that one barrier a round is enough.
  float energies[2][ROW_WARPS][2 * ROWS_AT_ONCE];
  float products[2][ROW_WARPS][2 * ROWS_AT_ONCE * MAX_LONG_ROWS];
  double sums[ROW_SUMS * ROW_WARPS];
};

// The rows that a block owns.
struct RowRun {
  int begin, end;
};

__device__ inline RowRun row_run(const CkaLargeArguments& arguments) {
  // Pairs of rows stay together.
  const int length =
      ceil_div(ceil_div(arguments.rows, arguments.row_blocks), ROWS_AT_ONCE) * ROWS_AT_ONCE;
  const int begin = min(static_cast<int>(blockIdx.x) * length, arguments.rows);
  return {begin, min(begin + length, arguments.rows)};
}

// Vectors of a thread: [side][row].
using RowFeatures = float[2][ROWS_AT_ONCE][FEATURE_VECTOR];
using RowMeans = float[2][FEATURE_VECTOR];
// Sums of products over a thread's columns: [side][row, long row].
using RowProducts = float[2][ROWS_AT_ONCE * MAX_LONG_ROWS];
// k and l of a thread's rows, or 0.
using RowWeights = float[2][ROWS_AT_ONCE];
// Weighted columns: X with k, X with l, Y with l, Y with k.
using WeightedColumns = float[4][FEATURE_VECTOR];

template <bool HAS_LONG>
struct RowPass {
  const CkaLargeArguments& arguments;
  const LongRows& long_rows;
  RowScratch& scratch;
  RowStream stream;
  RowRun run;
  int chunks;        // of 4096 columns
  int team_warps;    // that share a row
  int teams;         // that work on different rows at once
  int team, vector;  // of this thread; those of no team do nothing
  UnitScales scales;

  __device__ RowPass(const CkaLargeArguments& all, const LongRows& rows, RowScratch& memory)
      : arguments(all), long_rows(rows), scratch(memory), stream{memory.stream}, run(row_run(all)) {
    const int warps = ceil_div(all.width, 32 * FEATURE_VECTOR);
    chunks = ceil_div(warps, ROW_WARPS);
    team_warps = min(warps, ROW_WARPS);
    teams = ROW_WARPS / team_warps;
    team = static_cast<int>(threadIdx.x) / (32 * team_warps);
    vector = static_cast<int>(threadIdx.x) % (32 * team_warps);
    scales = *all.scales;
  }

  __device__ int rounds() const { return ceil_div(run.end - run.begin, ROWS_AT_ONCE * teams); }
  __device__ int row(int round, int i) const {
    return run.begin + (round * teams + team) * ROWS_AT_ONCE + i;
  }
  __device__ bool exists(int row) const { return team < teams && row < run.end; }
  __device__ int column(int chunk) const {
    return (chunk * ROW_THREADS + vector) * FEATURE_VECTOR;
  }
  __device__ float* products_of(int row) const {
    return arguments.row_products + static_cast<long long>(row) * (2 * MAX_LONG_ROWS);
  }

  __device__ void fetch(int slot, int round, int chunk) const {
    const FeatureColumns columns_x = feature_columns(arguments.x, column(chunk));
    const FeatureColumns columns_y = feature_columns(arguments.y, column(chunk));
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; ++i) {
      const int next = row(round, i);
      stream.fetch(slot, i, 0, columns_x, next * arguments.x.stride, exists(next));
      stream.fetch(slot, i, 1, columns_y, next * arguments.y.stride, exists(next));
    }
    commit_copies();
  }

  __device__ void read_means(int chunk, RowMeans& means) const {
    const bool exists = column(chunk) < arguments.width;
    const int first = exists ? column(chunk) : column(chunk) % (2 * FEATURE_VECTOR);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      load_floats(arguments.means + side * arguments.width + first, means[side]);
#pragma unroll
      for (int i = 0; i < FEATURE_VECTOR; ++i) means[side][i] = exists ? means[side][i] : 0;
    }
  }

  // Waits for a slot and reads it, centered; the slot is free after that.
  __device__ void read(int slot, const RowMeans& means, RowFeatures& x) const {
    wait_copies<ROW_SLOTS - 1>();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; ++i) {
        stream.read(slot, i, side, x[side][i]);
#pragma unroll
        for (int j = 0; j < FEATURE_VECTOR; ++j) x[side][i][j] -= means[side][j];
      }
    }
  }

  __device__ static void add_energies(const RowFeatures& x, float (&energies)[2 * ROWS_AT_ONCE]) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; ++i) {
#pragma unroll
        for (int j = 0; j < FEATURE_VECTOR; ++j) {
          energies[side * ROWS_AT_ONCE + i] += x[side][i][j] * x[side][i][j];
        }
      }
    }
  }

  __device__ void add_products(int chunk, const RowMeans& means, const RowFeatures& x,
                               RowProducts& products) const {
    if (column(chunk) >= arguments.width) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int s = 0; s < MAX_LONG_ROWS; ++s) {
        if (s >= long_rows.count) continue;
        const long long long_row = side * MAX_LONG_ROWS + s;
        const auto features = *reinterpret_cast<const FeatureVector*>(
            arguments.long_features + long_row * arguments.width + column(chunk));
        float p[FEATURE_VECTOR];
        unpack(features, p);
#pragma unroll
        for (int j = 0; j < FEATURE_VECTOR; ++j) {
          p[j] -= means[side][j];
#pragma unroll
          for (int i = 0; i < ROWS_AT_ONCE; ++i) {
            products[side][i * MAX_LONG_ROWS + s] += x[side][i][j] * p[j];
          }
        }
      }
    }
  }

  // Completes the sums of a round's rows over their teams and stores their terms. Lane l has the
  // energy of row l / 8 % 2 of side l / 16, and its product with the long row l % 8. It returns k
  // or l of this row, 0 for a row of S.
  __device__ float finish_rows(int round, float (&energies)[2 * ROWS_AT_ONCE],
                               RowProducts& products) const {
    static_assert(2 * ROWS_AT_ONCE * MAX_LONG_ROWS == 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = lane % MAX_LONG_ROWS;
    const int value = lane / MAX_LONG_ROWS, side = lane / 16;
    const int parity = round & 1, first_warp = team * team_warps;
    const float warp_energy = scatter_sum<1, 16>(energies);
    if (s == 0) scratch.energies[parity][warp][value] = warp_energy;
    if constexpr (HAS_LONG) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float warp_product = scatter_sum<1, 16>(products[i]);
        if (lane % 2 == 0) scratch.products[parity][warp][i * 16 + lane / 2] = warp_product;
      }
    }
    __syncthreads();
    const int warps = team < teams ? team_warps : 0;
    float energy = 0, product = 0;
    static_assert(ROW_WARPS == 2 * MAX_LONG_ROWS);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int other = s + half * MAX_LONG_ROWS;
      if (other < warps) energy += scratch.energies[parity][first_warp + other][value];
    }
    for (int other = 0; HAS_LONG && other < warps; ++other) {
      product += scratch.products[parity][first_warp + other][lane];
    }
    const float scale = side ? scales.y : scales.x;
    energy = warp_sum(energy, MAX_LONG_ROWS) * scale * scale;
    product *= scale * scale;
    const int lane_row = row(round, value % ROWS_AT_ONCE);
    const bool is_long = HAS_LONG && long_rows.has(lane_row);
    double sum = is_long ? 0 : -energy;
    if constexpr (HAS_LONG) {
      // The product of a long row with itself is left out.
      const bool counts = s < long_rows.count && arguments.long_rows[s] != lane_row;
      sum += warp_sum(counts ? static_cast<double>(product) : 0, MAX_LONG_ROWS);
    }
    if (warp == first_warp && exists(lane_row)) {
      auto* terms = reinterpret_cast<float*>(arguments.row_terms + lane_row);
      if (s < 2) terms[2 * s + side] = s == 0 ? energy : static_cast<float>(sum);
      if (HAS_LONG) products_of(lane_row)[side * MAX_LONG_ROWS + s] = product;
    }
    return exists(lane_row) && !is_long ? static_cast<float>(sum) : 0;
  }

  __device__ static void add_weighted(const RowFeatures& x, const RowWeights& weights,
                                      WeightedColumns& columns) {
#pragma unroll
    for (int kind = 0; kind < 4; ++kind) {
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; ++i) {
        const float weight = weights[kind == 1 || kind == 2][i];
#pragma unroll
        for (int j = 0; j < FEATURE_VECTOR; ++j) columns[kind][j] += weight * x[kind / 2][i][j];
      }
    }
  }

  // Stores the weighted columns of a chunk, added up over all teams. No copies are pending.
  __device__ void store_weighted(int chunk, const WeightedColumns& columns) const {
    __syncthreads();
    auto* memory = reinterpret_cast<Vector<float, 4>*>(scratch.stream);
    static_assert(8 * ROW_THREADS * sizeof(*memory) <= RowStream::BYTES);
#pragma unroll
    for (int kind = 0; kind < 4; ++kind) {
      const float(&x)[FEATURE_VECTOR] = columns[kind];
      memory[2 * kind * ROW_THREADS + threadIdx.x] = {x[0], x[1], x[2], x[3]};
      // In other banks than the first half, which is read with it.
      memory[(2 * kind + 1) * ROW_THREADS + (threadIdx.x ^ 4)] = {x[4], x[5], x[6], x[7]};
    }
    __syncthreads();
    const int width = arguments.width;
    float* out = arguments.weighted_parts + static_cast<long long>(blockIdx.x) * 4 * width;
    const int vectors = 32 * team_warps;
    for (int i = threadIdx.x; i < 8 * vectors; i += ROW_THREADS) {
      // Neighbours store both halves of a vector.
      const int kind = i / (2 * vectors), half = i % 2, of_vector = i / 2 % vectors;
      const int first = (chunk * ROW_THREADS + of_vector) * FEATURE_VECTOR + 4 * half;
      if (first >= width) continue;
      Vector<float, 4> total = {};
      for (int other = 0; other < teams; ++other) {
        const Vector<float, 4> part =
            memory[(2 * kind + half) * ROW_THREADS + other * vectors + (of_vector ^ 4 * half)];
#pragma unroll
        for (int j = 0; j < 4; ++j) total.elements[j] += part.elements[j];
      }
      // Indexed as vectors: else the compiler stores elements.
      reinterpret_cast<Vector<float, 4>*>(out + kind * width)[first / 4] = total;
    }
    __syncthreads();
  }

  // Terms of all rows and, if nothing has to be read again, their weighted columns.
  __device__ void sum_rows() const {
    const bool weighs = !HAS_LONG && chunks == 1;
    const int count = rounds() * chunks;
    RowMeans means;
    WeightedColumns columns = {};
    RowProducts products = {};
    float energies[2 * ROWS_AT_ONCE] = {};
    read_means(0, means);
#pragma unroll
    for (int slot = 0; slot < ROW_SLOTS; ++slot) fetch(slot, slot / chunks, slot % chunks);
    int next_round = ROW_SLOTS / chunks, next_chunk = ROW_SLOTS % chunks;
    for (int i = 0, slot = 0, round = 0, chunk = 0; i < count; ++i, slot ^= 1) {
      if (chunks > 1) read_means(chunk, means);
      RowFeatures x;
      read(slot, means, x);
      fetch(slot, next_round, next_chunk);
      if (++next_chunk == chunks) {
        next_chunk = 0;
        ++next_round;
      }
      add_energies(x, energies);
      if constexpr (HAS_LONG) add_products(chunk, means, x, products);
      if (++chunk < chunks) continue;
      const float sum = finish_rows(round, energies, products);
      if (weighs) {
        RowWeights weights;
#pragma unroll
        for (int row = 0; row < ROWS_AT_ONCE; ++row) {
          weights[0][row] = __shfl_sync(0xffffffffu, sum, MAX_LONG_ROWS * row);
          weights[1][row] = __shfl_sync(0xffffffffu, sum, MAX_LONG_ROWS * row + 16);
        }
        add_weighted(x, weights, columns);
      }
      chunk = 0;
      ++round;
#pragma unroll
      for (int k = 0; k < 2 * ROWS_AT_ONCE; ++k) energies[k] = 0;
#pragma unroll
      for (int k = 0; k < ROWS_AT_ONCE * MAX_LONG_ROWS; ++k) products[0][k] = products[1][k] = 0;
    }
    wait_copies<0>();
    if (weighs) store_weighted(0, columns);
  }

  // Reads the features again and weights their columns with the terms of their rows.
  __device__ void weight_columns() const {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      RowMeans means;
      WeightedColumns columns = {};
      read_means(chunk, means);
#pragma unroll
      for (int slot = 0; slot < ROW_SLOTS; ++slot) fetch(slot, slot, chunk);
      for (int round = 0; round < rounds(); ++round) {
        RowWeights weights;
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; ++i) {
          const int next = row(round, i);
          const bool counts = exists(next) && !(HAS_LONG && long_rows.has(next));
          const RowTerms terms = counts ? arguments.row_terms[next] : RowTerms{};
          weights[0][i] = terms.sums[0];
          weights[1][i] = terms.sums[1];
        }
        RowFeatures x;
        read(round & 1, means, x);
        fetch(round & 1, round + ROW_SLOTS, chunk);
        add_weighted(x, weights, columns);
      }
      wait_copies<0>();
      store_weighted(chunk, columns);
    }
  }

  // Adds a row's terms to the sums over all rows.
  __device__ void add_terms(int row, double (&totals)[ROW_SUMS]) const {
    const RowTerms terms = arguments.row_terms[row];
    const double r = terms.energies[0], q = terms.energies[1];
    const double k = terms.sums[0], l = terms.sums[1];
    totals[SUM_K] += k;
    totals[SUM_L] += l;
    totals[SQUARE_K] += k * k;
    totals[SQUARE_L] += l * l;
    totals[PRODUCT_KL] += k * l;
    if (HAS_LONG && long_rows.has(row)) return;
    totals[PAIRS_XX] -= r * r;
    totals[PAIRS_YY] -= q * q;
    totals[PAIRS_XY] -= r * q;
    totals[REST_X] += r;
    totals[REST_Y] += q;
  }

  // Adds the products of a row and a long row.
  __device__ void add_pair(int row, int s, double (&totals)[ROW_SUMS]) const {
    if (s >= long_rows.count || arguments.long_rows[s] == row) return;
    const double x = products_of(row)[s], y = products_of(row)[MAX_LONG_ROWS + s];
    // A pair of a long and another row counts for both orders. A pair of long rows is visited
    // twice.
    const double orders = long_rows.has(row) ? 1 : 2;
    totals[PAIRS_XX] += orders * x * x;
    totals[PAIRS_YY] += orders * y * y;
    totals[PAIRS_XY] += orders * x * y;
  }

  __device__ void store_sums() const {
    double totals[ROW_SUMS] = {};
    for (int row = run.begin + static_cast<int>(threadIdx.x); row < run.end; row += ROW_THREADS) {
      add_terms(row, totals);
    }
    const int pairs = HAS_LONG ? (run.end - run.begin) * MAX_LONG_ROWS : 0;
    for (int pair = threadIdx.x; pair < pairs; pair += ROW_THREADS) {
      add_pair(run.begin + pair / MAX_LONG_ROWS, pair % MAX_LONG_ROWS, totals);
    }
    // The energies of the means, from one block.
    const int width = arguments.width;
    for (int i = threadIdx.x; i < 2 * width && blockIdx.x == 0; i += ROW_THREADS) {
      const double scale = i < width ? scales.x : scales.y;
      const double mean = arguments.means[i] * scale;
      totals[MEAN_X] += i < width ? mean * mean : 0;
      totals[MEAN_Y] += i < width ? 0 : mean * mean;
    }
    const double total = block_sum_of_thread(totals, scratch.sums);
    if (threadIdx.x < ROW_SUMS) {
      arguments.row_sums[threadIdx.x * arguments.row_blocks + blockIdx.x] = total;
    }
  }

  __device__ void execute() const {
    sum_rows();
    // Makes the terms visible to all threads of the block.
    __syncthreads();
    if (HAS_LONG || chunks > 1) weight_columns();
    store_sums();
  }
};

}  // namespace rift
