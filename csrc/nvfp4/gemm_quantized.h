// nvfp4_gemm.quantized: the checks of a call and its outputs, for CPU and CUDA alike.
#pragma once
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "gemm.h"

namespace n3::nvfp4_gemm {

constexpr const char* quantized_op = "nvfp4_gemm.quantized";

// Checks one call; returns the problem with null pointers, and what becomes of its result.
inline std::tuple<Params, Codes> check_quantized(const Tensor& a, const Tensor& a_scale, const Tensor& a_global,
                                                 const Tensor& b, const Tensor& b_scale, const Tensor& b_global,
                                                 const Tensor& global_scale, const OptionalTensor& bias,
                                                 const std::optional<std::string>& activation,
                                                 const std::string& a_layout, const std::string& b_layout,
                                                 const std::string& scale_layout) {
  constexpr const char* op = quantized_op;
  const Params p =
      check_operands(op, a, a_scale, a_global, b, b_scale, b_global, bias, ScalarType::Float, a_layout, b_layout);
  N3_CHECK(op, p.n % 16 == 0, "b must have rows in multiples of 16, got ", p.n);
  check_dtype(op, "global_scale", global_scale, ScalarType::Float);
  N3_CHECK(op, global_scale.numel() == 1, "global_scale must have 1 element, got ", global_scale.numel());
  N3_CHECK(op, !activation || *activation == "relu2", "activation must be one of None, relu2, got ", *activation);
  N3_CHECK(op, scale_layout == "linear" || scale_layout == "128x4", "scale_layout must be one of linear, 128x4, got ",
           scale_layout);
  check_same_device(op, "global_scale", global_scale, "a", a);
  return {p, Codes{nullptr, nullptr, scale_layout == "128x4", activation.has_value()}};
}

// Uninitialised codes and scales, and the pointers to them; the Python twin is in n3kernels/nvfp4/gemm_quantize.py.
inline std::tuple<Tensor, Tensor> quantized_outputs(const Tensor& a, Params& p, Codes& codes) {
  const int64_t rows = p.n ? p.m : 0, ks = p.n / 16;  // what has no columns has no rows either, as in nvfp4_quantize
  const Tensor q = torch::stable::new_empty(a, {p.m, p.n / 2}, ScalarType::Byte);
  const Tensor scale = codes.swizzled ? torch::stable::new_empty(a, {rounded_up(rows, 128), rounded_up(ks, 4)},
                                                                 ScalarType::Float8_e4m3fn)
                                      : torch::stable::new_empty(a, {p.m, ks}, ScalarType::Float8_e4m3fn);
  p.y = q.mutable_data_ptr();
  codes.scale = static_cast<uint8_t*>(scale.mutable_data_ptr());
  return {q, scale};
}

}  // namespace n3::nvfp4_gemm
