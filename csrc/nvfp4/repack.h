// nvfp4_repack: NVFP4 weights as the blob of repack_plan.h.
#pragma once
#include "../common/check.h"
#include "repack_plan.h"

namespace n3::nvfp4_repack {

constexpr const char* op = "nvfp4_repack";

// Checks one call, for CPU and CUDA alike; returns the problem with null pointers.
inline Weights check(const Tensor& q, const Tensor& block_scale) {
  check_dtype(op, "q", q, ScalarType::Byte);
  check_dtype(op, "block_scale", block_scale, ScalarType::Float8_e4m3fn);
  check_dim(op, "q", q, 2);
  const int64_t n = q.size(0), k = q.size(1) * 2;
  N3_CHECK(op, k > 0 && k % 16 == 0, "q must have a last dimension that is a positive multiple of 8, got ", k / 2);
  check_shape(op, "block_scale", block_scale, {n, k / 16});
  check_same_device(op, "block_scale", block_scale, "q", q);
  return {nullptr, nullptr, n, k};
}

}  // namespace n3::nvfp4_repack
