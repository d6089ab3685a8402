// moe_experts_bwd: the gradients of moe_experts on dense weights in x, w_up, w_down and weights.
#pragma once
#include "experts.h"

namespace n3::moe_experts_bwd {

using moe_experts::Params;

constexpr const char* op = "moe_experts_bwd";

// Checks one call; returns the forward's problem with null pointers.
inline Params check(const Tensor& grad_y, const Tensor& x, const Tensor& w_up, const Tensor& w_down, const Tensor& ids,
                    const Tensor& weights, const std::string& activation, int64_t first_expert) {
  N3_CHECK(op, w_up.scalar_type() != ScalarType::Byte,
           "w_up must be dense, got NVFP4: decode it first to train through it");
  const Params p = moe_experts::check(x, w_up, w_down, ids, weights, {}, {}, {}, {}, {}, activation, first_expert, {});
  check_same_dtype(op, "grad_y", grad_y, "x", x);
  check_shape(op, "grad_y", grad_y, {p.tokens, p.width});
  check_same_device(op, "grad_y", grad_y, "x", x);
  return p;
}

}  // namespace n3::moe_experts_bwd
