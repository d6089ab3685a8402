// nvfp4_linear.packed: nvfp4_linear on the blob of nvfp4_repack.
#pragma once
#include <optional>
#include <string>

#include "../common/check.h"
#include "repack_plan.h"

namespace n3::nvfp4_linear_packed {

constexpr const char* op = "nvfp4_linear.packed";

// Checks one call; returns the number of rows of x.
inline int64_t check(const Tensor& x, const Tensor& blob, const Tensor& global_scale, int64_t n,
                     const std::optional<Tensor>& bias, const std::optional<std::string>& activation) {
  check_floating(op, "x", x.scalar_type());
  check_dtype(op, "blob", blob, ScalarType::Byte);
  check_dtype(op, "global_scale", global_scale, ScalarType::Float);
  N3_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got 0");
  const int64_t k = x.size(-1);
  N3_CHECK(op, k > 0 && k % 16 == 0, "x must have a last dimension that is a positive multiple of 16, got ", k);
  N3_CHECK(op, n >= 0, "n must not be negative, got ", n);
  check_shape(op, "blob", blob, {nvfp4_repack::row_tiles(n), nvfp4_repack::row_bytes(k)});
  N3_CHECK(op, global_scale.numel() == 1, "global_scale must have 1 element, got ", global_scale.numel());
  if (bias) {
    check_same_dtype(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, {n});
  }
  N3_CHECK(op, !activation || *activation == "relu2", "activation must be one of None, relu2, got ", *activation);
  check_same_device(op, "blob", blob, "x", x);
  check_same_device(op, "global_scale", global_scale, "x", x);
  if (bias) check_same_device(op, "bias", *bias, "x", x);
  return x.numel() / k;
}

}  // namespace n3::nvfp4_linear_packed
