// nvfp4_embedding: y[i] = row ids[i] of an NVFP4 matrix, decoded as nvfp4_dequantize does.
#pragma once
#include "../common/check.h"

namespace n3::nvfp4_embedding {

constexpr const char* op = "nvfp4_embedding";

struct Params {
  const void* ids;                // int32 or int64, `count` of them
  const uint8_t *q, *block_scale;  // [n, k / 2], [n, k / 16]
  const float* global_scale;
  void* y;  // [count, k]
  int64_t count, n, k;
};

// Checks one call, for CPU and CUDA alike; returns the problem with null pointers. The values of ids are the kernel's.
inline Params check(const Tensor& ids, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
                    ScalarType dtype) {
  N3_CHECK(op, ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long,
           "ids must be int32 or int64, got ", dtype_name(ids.scalar_type()));
  check_dtype(op, "q", q, ScalarType::Byte);
  check_dtype(op, "block_scale", block_scale, ScalarType::Float8_e4m3fn);
  check_dtype(op, "global_scale", global_scale, ScalarType::Float);
  check_floating(op, "dtype", dtype);
  check_dim(op, "q", q, 2);
  const int64_t n = q.size(0), bytes = q.size(1);
  N3_CHECK(op, bytes % 8 == 0, "q must have a last dimension that is a multiple of 8, got ", bytes);
  check_shape(op, "block_scale", block_scale, {n, bytes / 8});
  N3_CHECK(op, global_scale.numel() == 1, "global_scale must have 1 element, got ", global_scale.numel());
  check_same_device(op, "q", q, "ids", ids);
  check_same_device(op, "block_scale", block_scale, "ids", ids);
  check_same_device(op, "global_scale", global_scale, "ids", ids);
  return {nullptr, nullptr, nullptr, nullptr, nullptr, ids.numel(), n, bytes * 2};
}

}  // namespace n3::nvfp4_embedding
