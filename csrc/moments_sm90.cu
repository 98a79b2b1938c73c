#include "launch.h"
#include "moments.h"
#include "moments_sm90.cuh"

namespace rift {

void moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                  cudaStream_t stream) {
  constexpr const char* NAME = "moments_sm90";
  const TensorMap map_x = encode(x, MOMENT_CHUNK, NAME), map_y = encode(y, MOMENT_CHUNK, NAME);
  launch({NAME, PAIR * arguments.schedule.programs, MOMENT_THREADS, MOMENT_SHARED, PAIR}, stream,
         moments_sm90_kernel, arguments, map_x, map_y);
}

}  // namespace rift
