// grouped_linear_bwd: the gradients of grouped_linear on dense weights in x, w and row_scale.
#pragma once
#include "grouped_linear.h"

namespace n3::grouped_linear_bwd {

using grouped_linear::OptionalTensor;
using grouped_linear::Params;

constexpr const char* op = "grouped_linear_bwd";

// Checks one call; returns the forward's problem with null pointers. grouped_linear::check_values is the launcher's.
inline Params check(const Tensor& grad_y, const Tensor& x, const Tensor& w, const Tensor& offsets,
                    const OptionalTensor& gather, const OptionalTensor& row_scale,
                    const std::optional<std::string>& activation) {
  N3_CHECK(op, w.scalar_type() != ScalarType::Byte,
           "w must be dense, got NVFP4: decode it first to train through it");
  const Params p = grouped_linear::check(op, x, w, offsets, gather, row_scale, {}, {}, activation);
  check_same_dtype(op, "grad_y", grad_y, "x", x);
  check_shape(op, "grad_y", grad_y, {p.rows, p.outputs});
  check_same_device(op, "grad_y", grad_y, "x", x);
  return p;
}

}  // namespace n3::grouped_linear_bwd
