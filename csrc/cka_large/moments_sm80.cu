#include "cka_large/moments.h"
#include "cka_large/moments_sm80.cuh"
#include "common/launch.h"

namespace rift {

void moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream) {
  MomentMatrices matrices{x, y, {}, {}};
  if (arguments.patches) {
    matrices.patch_x = patch_matrix(arguments, x, false);
    matrices.patch_y = patch_matrix(arguments, y, true);
  }
  launch({"moments_sm80", arguments.schedule.programs, TILE_THREADS, MOMENT_RING_SHARED}, stream,
         moments_sm80_kernel, arguments, matrices);
}

}  // namespace rift
