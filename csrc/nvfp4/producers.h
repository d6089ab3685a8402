// Quantisers fused with what makes their input: y is rounded to the dtype of x, and quantised as by nvfp4_quantize.
//
//   relu2_nvfp4_quantize     y = relu(x)^2
//   silu_mul_nvfp4_quantize  y = a / (1 + exp(-a)) * b of x = [a, b], rounded once; the exponential within 2 ulp
//   rms_norm_nvfp4_quantize  y = (h * rstd) * weight, two fp32 roundings; h = x, or x + residual rounded to the dtype
//                            of the residual; rstd = 1 / sqrt(mean(h^2) + eps) in float64, rounded to fp32
//
// y is written to memory only where it is asked for (keep).
#pragma once
#include <cstdio>

#include "quantize.h"

namespace n3::nvfp4_producers {

using nvfp4_quantize::Form;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* relu2_op = "relu2_nvfp4_quantize";
constexpr const char* silu_mul_op = "silu_mul_nvfp4_quantize";
constexpr const char* rms_norm_op = "rms_norm_nvfp4_quantize";

// All check one call, for CPU and CUDA alike; they return the problem of quantising y, with null pointers.

// Of an activation that makes 1 element of `factor`.
inline nvfp4_quantize::Params check_activation(const char* op, int64_t factor, const Tensor& x,
                                               const OptionalTensor& global_scale, bool four_over_six,
                                               const std::string& metric, bool per_row,
                                               const std::string& scale_layout) {
  check_floating(op, "x", x.scalar_type());
  N3_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got 0");
  const int64_t width = x.size(-1), multiple = 16 * factor;
  N3_CHECK(op, width % multiple == 0, "x must have a last dimension that is a multiple of ", multiple, ", got ", width);
  const int64_t k = width / factor;
  const Form form =
      nvfp4_quantize::check_form(op, x, k, global_scale, four_over_six, metric, per_row, scale_layout);
  return nvfp4_quantize::params_of(x, k, form);
}

// float32 or the dtype of x.
inline void check_float_or_same(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  const ScalarType dtype = t.scalar_type(), other = x.scalar_type();
  N3_CHECK(op, dtype == ScalarType::Float || dtype == other, name, " must be float32",
           other == ScalarType::Float ? "" : std::string(" or ") + dtype_name(other), ", got ", dtype_name(dtype));
}

inline nvfp4_quantize::Params check_rms_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                                             const OptionalTensor& global_scale, double eps, bool four_over_six,
                                             const std::string& metric, bool per_row,
                                             const std::string& scale_layout) {
  const char* op = rms_norm_op;
  check_floating(op, "x", x.scalar_type());
  N3_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got 0");
  const int64_t k = x.size(-1);
  check_float_or_same(op, "weight", weight, x);
  check_shape(op, "weight", weight, {k});
  if (residual) {
    check_float_or_same(op, "residual", *residual, x);
    check_shape(op, "residual", *residual, x.sizes());
  }
  char text[32];
  std::snprintf(text, sizeof text, "%g", eps);
  N3_CHECK(op, eps >= 0, "eps must be >= 0, got ", text);
  const Form form =
      nvfp4_quantize::check_form(op, x, k, global_scale, four_over_six, metric, per_row, scale_layout);
  check_same_device(op, "weight", weight, "x", x);
  if (residual) check_same_device(op, "residual", *residual, "x", x);
  return nvfp4_quantize::params_of(x, k, form);
}

}  // namespace n3::nvfp4_producers
