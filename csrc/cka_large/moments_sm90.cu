#include "cka_large/moments.h"
#include "cka_large/moments_sm90.cuh"
#include "common/launch.h"

namespace rift {

void moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream) {
  constexpr const char* NAME = "moments_sm90";
  MomentMaps maps{encode(x, MOMENT_CHUNK, NAME), encode(y, MOMENT_CHUNK, NAME), {}, {}};
  if (arguments.patches) {
    maps.patch_x = encode(patches_of(arguments, x, false), MOMENT_CHUNK, NAME);
    maps.patch_y = encode(patches_of(arguments, y, true), MOMENT_CHUNK, NAME);
  }
  launch({NAME, PAIR * arguments.schedule.programs, MOMENT_THREADS, MOMENT_SHARED, PAIR}, stream,
         moments_sm90_kernel, arguments, maps);
}

}  // namespace rift
