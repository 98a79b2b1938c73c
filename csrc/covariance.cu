#include "covariance.h"

#include "backward_sm80.cuh"
#include "backward_sm90.cuh"
#include "covariance_head.cuh"
#include "launch_pairs.h"
#include "moments.h"
#include "statistics.cuh"

namespace rift {
namespace {

Matrix matrix_of(const CovarianceSide& side, int rows) {
  return {side.features, side.stride, rows, side.width};
}

template <typename Kernel>
cudaError_t allow(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

cudaError_t covariance_forward(const CovarianceArguments& arguments, cudaStream_t stream) {
  statistics_kernel<<<static_cast<unsigned>(arguments.statistics_programs()), STATISTICS_THREADS,
                      sizeof(StatisticsScratch), stream>>>(arguments);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const MomentsArguments moments{arguments.schedule, arguments.tiles, arguments.spill};
  const Matrix x = matrix_of(arguments.x, arguments.rows), y = matrix_of(arguments.y, arguments.rows);
  error = arguments.hopper ? moments_sm90(moments, x, y, stream) : moments_sm80(moments, x, y, stream);
  if (error != cudaSuccess) return error;
  if (arguments.debiased) {
    const int bytes = rows_shared(arguments.width);
    error = allow(rows_kernel, bytes);
    if (error != cudaSuccess) return error;
    rows_kernel<<<static_cast<unsigned>(arguments.row_programs), STATISTICS_THREADS,
                  static_cast<size_t>(bytes), stream>>>(arguments);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  covariance_head_kernel<<<static_cast<unsigned>(arguments.head_programs()), HEAD_THREADS,
                           sizeof(HeadScratch), stream>>>(arguments);
  return cudaGetLastError();
}

namespace {

cudaError_t backward_sm90(const BackwardArguments& all, const BackwardMatrices& matrices,
                          cudaStream_t stream) {
  BackwardMaps maps;
  cudaError_t error = encode(matrices.own, BACKWARD_ROWS, &maps.own);
  if (error == cudaSuccess) error = encode(matrices.other, BACKWARD_ROWS, &maps.other);
  if (error == cudaSuccess) error = encode(matrices.planes, BOX_COLUMNS, &maps.planes);
  if (error != cudaSuccess) return error;
  return launch_pairs(backward_sm90_kernel, backward_pairs(all.forward, all.side), MOMENT_THREADS,
                      BACKWARD_SHARED, stream, all, maps);
}

cudaError_t backward_sm80(const BackwardArguments& all, const BackwardMatrices& matrices,
                          cudaStream_t stream) {
  const cudaError_t error = allow(backward_sm80_kernel, BACKWARD_RING_SHARED);
  if (error != cudaSuccess) return error;
  backward_sm80_kernel<<<static_cast<unsigned>(backward_tiles(all.forward, all.side)),
                         TILE_THREADS, BACKWARD_RING_SHARED, stream>>>(all, matrices);
  return cudaGetLastError();
}

}  // namespace

cudaError_t covariance_backward(const CovarianceArguments& arguments, int side,
                                const float* incoming, void* grad, cudaStream_t stream) {
  const BackwardArguments all{arguments, incoming, static_cast<unsigned short*>(grad), side};
  const void* planes = side == 0 ? arguments.planes_x : arguments.planes_y;
  const BackwardMatrices matrices{matrix_of(all.own(), arguments.rows),
                                  matrix_of(all.other(), arguments.rows),
                                  {planes, arguments.width, 4LL * arguments.width, arguments.width}};
  return arguments.hopper ? backward_sm90(all, matrices, stream)
                          : backward_sm80(all, matrices, stream);
}

}  // namespace rift
