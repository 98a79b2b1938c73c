#include "launch.h"
#include "moments.h"
#include "moments_sm80.cuh"

namespace rift {

void moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream) {
  launch({"moments_sm80", arguments.schedule.programs, TILE_THREADS, MOMENT_RING_SHARED}, stream,
         moments_sm80_kernel, arguments, x, y);
}

}  // namespace rift
