// gated_rms_norm: out = weight * RMSNorm(x * silu(z)) over groups of the last dimension, or with norm_before_gate
// weight * RMSNorm(x) * silu(z). In float32, rounded once:
//
//   h = x * silu(z)   rstd = 1 / sqrt(sum(h h) / group_size + eps)   out = (h * rstd) * weight [* silu(z)]
//
// Backward, with n = h * rstd, g = grad_y * weight [* silu(z)] and m = mean(g n) over the group:
//
//   dh = rstd * (g - n m)   dweight = sum over rows of grad_y n [* silu(z)]
//   gate first: dx = dh * silu(z), dz = dh * x * silu'(z)      norm first: dx = dh, dz = grad_y * n * weight * silu'(z)
#pragma once
#include <optional>

#include "operands.h"

namespace n3::gated_norm {

using mamba::Operand;
using mamba::OptionalTensor;

constexpr const char* op = "gated_rms_norm";
constexpr const char* bwd_op = "gated_rms_norm_bwd";

struct Params {
  Operand x, z;    // strides: row, element; z.data is null without a gate
  Operand weight;  // stride: element
  void* y;         // contiguous, dtype of x; the launcher's to fill in
  int64_t rows, dim, group_size;
  float eps;
  bool norm_before_gate;
};

struct BackwardParams {
  Params forward;           // y unused
  Operand grad_y;           // strides: row, element
  void *dx, *dz, *dweight;  // contiguous, dtypes of x, z and weight; the launcher's to fill in, dz null without z
};

// [..., dim] as rows of dim elements, read in place where one stride leads from row to row; else null, and the launcher
// makes it contiguous.
inline Operand rows_of(const OptionalTensor& t) {
  Operand o;
  if (!t) return o;
  o.dtype = t->scalar_type();
  o.strides[1] = t->stride(-1);
  int64_t last = t->dim() - 1;  // the dimension that is the row so far; dim - 1: none yet
  for (int64_t i = t->dim() - 2; i >= 0; --i) {
    if (t->size(i) == 1) continue;
    if (last == t->dim() - 1) {
      o.strides[0] = t->stride(i);
    } else if (t->stride(i) != t->stride(last) * t->size(last)) {
      return o;
    }
    last = i;
  }
  o.data = const_cast<void*>(t->const_data_ptr());
  return o;
}

// Checks one call, for CPU and CUDA alike; y is left to the launcher, as are x and z where their rows have no stride.
inline Params check(const Tensor& x, const OptionalTensor& z, const Tensor& weight, int64_t group_size, double eps,
                    bool norm_before_gate) {
  N3_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got 0");
  check_floating(op, "x", x.scalar_type());
  if (z) {
    N3_CHECK(op, shape_str(*z) == shape_str(x), "z must have shape ", shape_str(x), ", got ", shape_str(*z));
    check_same_dtype(op, "z", *z, "x", x);
  }
  const int64_t dim = x.size(-1);
  check_shape(op, "weight", weight, {dim});
  check_floating(op, "weight", weight.scalar_type());
  N3_CHECK(op, group_size > 0 && dim % group_size == 0, "group_size must divide the last dimension ", dim, ", got ",
           group_size);
  mamba::check_on_device(op, "z", z, x);
  check_same_device(op, "weight", weight, "x", x);
  Params p{};
  p.x = rows_of(x), p.z = rows_of(z), p.weight = mamba::operand_of(weight);
  p.rows = dim ? x.numel() / dim : 0, p.dim = dim, p.group_size = group_size;
  p.eps = float(eps), p.norm_before_gate = norm_before_gate;
  return p;
}

// The same for the backward; the gradients are left to the launcher.
inline BackwardParams check_bwd(const Tensor& grad_y, const Tensor& x, const OptionalTensor& z, const Tensor& weight,
                                int64_t group_size, double eps, bool norm_before_gate) {
  BackwardParams p{};
  p.forward = check(x, z, weight, group_size, eps, norm_before_gate);
  N3_CHECK(bwd_op, shape_str(grad_y) == shape_str(x), "grad_y must have shape ", shape_str(x), ", got ",
           shape_str(grad_y));
  check_same_dtype(bwd_op, "grad_y", grad_y, "x", x);
  check_same_device(bwd_op, "grad_y", grad_y, "x", x);
  p.grad_y = rows_of(grad_y);
  return p;
}

}  // namespace n3::gated_norm
