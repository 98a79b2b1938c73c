#include "cka_large/tensor_map.h"

#include "cka_large/moments_layout.h"
#include "common/driver.h"
#include "common/sm90.cuh"

#if CUDART_VERSION < 12000

#include <stdexcept>

// CUDA 11 has neither tensor maps nor sm_90a, whose kernels would use them.
rift::TensorMap rift::encode_tensor_map(const Matrix&, int, const char* kernel) {
  throw std::runtime_error(std::string(kernel) + ": needs a build by CUDA 12.0 or newer");
}

#else

namespace rift {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

TensorMap encode_tensor_map(const Matrix& matrix, int box_rows, const char* kernel) {
  static const auto function =
      driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[2] = {BOX_COLUMNS, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  TensorMap map;
  check_driver(function(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                        const_cast<void*>(matrix.elements), size, stride, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
               kernel, "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace rift

#endif
