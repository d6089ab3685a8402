// nvfp4_linear: y = act(x W^T * global_scale + bias), W decoded exactly, sums in fp32, y in the dtype of x.
// relu2 is relu(v)^2.
#pragma once
#include <optional>
#include <string>

#include "../common/check.h"

namespace n3::nvfp4_linear {

constexpr const char* op = "nvfp4_linear";

struct Params {
  const void* x;                   // [m, k]
  const uint8_t *q, *block_scale;  // [n, k / 2], [n, k / 16]
  const float* global_scale;
  const void* bias;  // [n] in the dtype of x, or null
  void* y;           // [m, n]
  int64_t m, n, k;
  bool relu2;
};

// Checks one call, for CPU and CUDA alike, of this operator or of nvfp4_linear_fp8; returns the problem with null
// pointers.
inline Params check(const Tensor& x, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
                    const std::optional<Tensor>& bias, const std::optional<std::string>& activation,
                    const char* op = nvfp4_linear::op) {
  check_floating(op, "x", x.scalar_type());
  check_dtype(op, "q", q, ScalarType::Byte);
  check_dtype(op, "block_scale", block_scale, ScalarType::Float8_e4m3fn);
  check_dtype(op, "global_scale", global_scale, ScalarType::Float);
  N3_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got 0");
  const int64_t k = x.size(-1);
  N3_CHECK(op, k > 0 && k % 16 == 0, "x must have a last dimension that is a positive multiple of 16, got ", k);
  check_dim(op, "q", q, 2);
  const int64_t n = q.size(0);
  check_shape(op, "q", q, {n, k / 2});
  check_shape(op, "block_scale", block_scale, {n, k / 16});
  N3_CHECK(op, global_scale.numel() == 1, "global_scale must have 1 element, got ", global_scale.numel());
  if (bias) {
    check_same_dtype(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, {n});
  }
  N3_CHECK(op, !activation || *activation == "relu2", "activation must be one of None, relu2, got ", *activation);
  check_same_device(op, "q", q, "x", x);
  check_same_device(op, "block_scale", block_scale, "x", x);
  check_same_device(op, "global_scale", global_scale, "x", x);
  if (bias) check_same_device(op, "bias", *bias, "x", x);
  return {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, x.numel() / k, n, k, activation.has_value()};
}

}  // namespace n3::nvfp4_linear
