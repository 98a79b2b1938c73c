#include "cka_large/moments.h"
#include "cka_large/moments_sm90.cuh"
#include "common/launch.h"

namespace rift {

void moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream) {
  constexpr const char* NAME = "moments_sm90";
  MomentMaps maps{
      encode_tensor_map(x, MOMENT_CHUNK, NAME), encode_tensor_map(y, MOMENT_CHUNK, NAME), {}, {}};
  if (arguments.patches) {
    maps.patch_x = encode_tensor_map(patch_matrix(arguments, x, false), MOMENT_CHUNK, NAME);
    maps.patch_y = encode_tensor_map(patch_matrix(arguments, y, true), MOMENT_CHUNK, NAME);
  }
  launch({NAME, CLUSTER_SIZE * arguments.schedule.programs, MOMENT_THREADS, MOMENT_SHARED,
          CLUSTER_SIZE},
         stream, moments_sm90_kernel, arguments, maps);
}

}  // namespace rift
