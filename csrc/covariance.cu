#include "covariance.h"

#include "backward_sm90.cuh"
#include "covariance_head.cuh"
#include "launch_pairs.h"
#include "moments_sm90.h"
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
  error = moments_sm90(moments, matrix_of(arguments.x, arguments.rows),
                       matrix_of(arguments.y, arguments.rows), stream);
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

cudaError_t covariance_backward(const CovarianceArguments& arguments, int side,
                                const float* incoming, void* grad, cudaStream_t stream) {
  const CovarianceSide& own = side == 0 ? arguments.x : arguments.y;
  const CovarianceSide& other = side == 0 ? arguments.y : arguments.x;
  const void* planes = side == 0 ? arguments.planes_x : arguments.planes_y;
  BackwardMaps maps;
  cudaError_t error = encode(matrix_of(own, arguments.rows), BACKWARD_ROWS, &maps.own);
  if (error == cudaSuccess) {
    error = encode(matrix_of(other, arguments.rows), BACKWARD_ROWS, &maps.other);
  }
  if (error == cudaSuccess) {
    error = encode({planes, arguments.width, 4LL * arguments.width, arguments.width}, BOX_COLUMNS,
                   &maps.planes);
  }
  if (error != cudaSuccess) return error;
  const BackwardArguments all{arguments, incoming, static_cast<unsigned short*>(grad), side};
  return launch_pairs(backward_sm90_kernel, backward_pairs(arguments, side), MOMENT_THREADS,
                      BACKWARD_SHARED, stream, all, maps);
}

}  // namespace rift
