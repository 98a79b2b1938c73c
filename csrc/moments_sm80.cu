#include "moments.h"

#include "moments_sm80.cuh"

namespace rift {

cudaError_t moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                         cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      moments_sm80_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOMENT_RING_SHARED);
  if (error != cudaSuccess) return error;
  moments_sm80_kernel<<<static_cast<unsigned>(arguments.schedule.programs), TILE_THREADS,
                        MOMENT_RING_SHARED, stream>>>(arguments, x, y);
  return cudaGetLastError();
}

}  // namespace rift
