#include "cka_large/cka_large.h"

#include "cka_large/backward_sm80.cuh"
#include "cka_large/backward_sm90.cuh"
#include "cka_large/head.cuh"
#include "cka_large/moments.h"
#include "cka_large/row_terms.cuh"
#include "cka_large/statistics.cuh"
#include "common/launch.h"

namespace rift {
namespace {

Matrix make_matrix(const CkaLargeSide& side, int rows) {
  return {side.features, side.stride, rows, side.width};
}

}  // namespace

void cka_large_forward(const CkaLargeArguments& arguments, cudaStream_t stream) {
  launch({"statistics", arguments.statistics_blocks(), STATISTICS_THREADS,
          sizeof(StatisticsScratch)},
         stream, statistics_kernel, arguments);
  launch({"means", 2 * arguments.width / MEANS_THREADS, MEANS_THREADS, sizeof(MeansScratch)},
         stream, means_kernel, arguments);
  if (arguments.debiased) {
    launch({"longest", arguments.row_blocks, ROW_THREADS, sizeof(LongestScratch)}, stream,
           longest_kernel, arguments);
    launch({"row_terms", arguments.row_blocks, ROW_THREADS, sizeof(RowScratch)}, stream,
           row_terms_kernel, arguments);
  }
  const MomentsArguments moments{arguments.schedule,  arguments.tiles,   arguments.spill,
                                 arguments.long_rows, arguments.patches, arguments.width};
  const Matrix x = make_matrix(arguments.x, arguments.rows);
  const Matrix y = make_matrix(arguments.y, arguments.rows);
  (arguments.hopper ? moments_sm90 : moments_sm80)(moments, x, y, stream);
  launch({"cka_large_head", arguments.head_blocks(), HEAD_THREADS, sizeof(HeadScratch)}, stream,
         cka_large_head_kernel, arguments);
}

namespace {

void backward_sm90(const BackwardArguments& arguments, const BackwardMatrices& matrices,
                   cudaStream_t stream) {
  constexpr const char* NAME = "backward_sm90";
  const BackwardMaps maps{encode_tensor_map(matrices.own, BACKWARD_ROWS, NAME),
                          encode_tensor_map(matrices.other, BACKWARD_ROWS, NAME),
                          encode_tensor_map(matrices.planes, BOX_COLUMNS, NAME)};
  const int clusters = backward_units(arguments.forward, arguments.side).clusters;
  launch({NAME, CLUSTER_SIZE * clusters, MOMENT_THREADS, BACKWARD_SHARED, CLUSTER_SIZE}, stream,
         backward_sm90_kernel, arguments, maps);
}

void backward_sm80(const BackwardArguments& arguments, const BackwardMatrices& matrices,
                   cudaStream_t stream) {
  launch({"backward_sm80", backward_tiles(arguments.forward, arguments.side), TILE_THREADS,
          BACKWARD_RING_SHARED},
         stream, backward_sm80_kernel, arguments, matrices);
}

}  // namespace

void cka_large_backward(const CkaLargeArguments& arguments, int side, const float* incoming,
                        void* grad, cudaStream_t stream) {
  const BackwardArguments backward{arguments, incoming, static_cast<unsigned short*>(grad), side};
  const void* planes = side == 0 ? arguments.planes_x : arguments.planes_y;
  const BackwardMatrices matrices{
      make_matrix(backward.own_side(), arguments.rows),
      make_matrix(backward.other_side(), arguments.rows),
      {planes, arguments.width, 4LL * arguments.width, arguments.width}};
  (arguments.hopper ? backward_sm90 : backward_sm80)(backward, matrices, stream);
}

}  // namespace rift
