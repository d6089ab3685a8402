// Descriptors of tensors for the copy engine of sm_90 (hopper.cuh: load_tile).
#pragma once
#include <cudaTypedefs.h>

#include "cuda.h"

namespace n3 {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder(const char* op) {
  static const auto function = [op] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    N3_CUDA_CHECK(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
    N3_CHECK(op, found == cudaDriverEntryPointSuccess, "the CUDA driver must be of version 12.0 or later");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
  }();
  return function;
}

// A tensor of 16-bit elements, its sizes and strides in elements, innermost first and that one contiguous; `box` is
// what one copy moves, in swizzled rows of 64 elements (128 bytes), 32 or 16. Of a dimension of size 1 the
// stride does not matter.
inline CUtensorMap tensor_map(const char* op, ScalarType type, const void* data, const int64_t (&sizes)[4],
                              const int64_t (&strides)[3], const int (&box)[4]) {
  cuuint64_t extent[4], step[3];
  cuuint32_t piece[4], every[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) extent[i] = cuuint64_t(sizes[i]), piece[i] = cuuint32_t(box[i]);
  for (int i = 0; i < 3; ++i) step[i] = 2 * cuuint64_t(sizes[i + 1] > 1 ? strides[i] : i ? step[i - 1] / 2 : sizes[0]);
  CUtensorMap map;
  const CUresult result = tensor_map_encoder(op)(
      &map, type == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      const_cast<void*>(data), extent, step, piece, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box[0] == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
      : box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                     : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  N3_CHECK(op, result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(result));
  return map;
}

}  // namespace n3
