#include "moments.h"

#include "launch_pairs.h"
#include "moments_sm90.cuh"

namespace rift {

cudaError_t moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                         cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  TensorMap map_x, map_y;
  cudaError_t error = encode(x, MOMENT_CHUNK, &map_x);
  if (error == cudaSuccess) error = encode(y, MOMENT_CHUNK, &map_y);
  if (error != cudaSuccess) return error;
  return launch_pairs(moments_sm90_kernel, arguments.schedule.programs, MOMENT_THREADS,
                      MOMENT_SHARED, stream, arguments, map_x, map_y);
}

}  // namespace rift
