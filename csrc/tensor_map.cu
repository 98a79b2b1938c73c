#include "tensor_map.h"

#include <cuda_runtime.h>

#if CUDART_VERSION < 12000

// No such maps yet, and no kernels that take them: sm_90a came with 12.0, too.
cudaError_t rift::encode(const Matrix&, int, TensorMap*) { return cudaErrorNotSupported; }

#else

#include <cudaTypedefs.h>

#include "moments_layout.h"
#include "sm90.cuh"

namespace rift {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

// The driver's function, without linking against the driver: there may be none.
cudaError_t encoder(PFN_cuTensorMapEncodeTiled_v12000* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  // That of the toolkit's version, which is 12.0 at least: older ones do not know the function.
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) return error;
  *function = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  return result == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorSymbolNotFound;
}

}  // namespace

cudaError_t encode(const Matrix& matrix, int box_rows, TensorMap* map) {
  static PFN_cuTensorMapEncodeTiled_v12000 function = nullptr;
  if (!function) {
    PFN_cuTensorMapEncodeTiled_v12000 found = nullptr;
    const cudaError_t error = encoder(&found);
    if (error != cudaSuccess) return error;
    function = found;
  }
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[2] = {BOX_COLUMNS, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = function(
      reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(matrix.elements), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace rift

#endif
