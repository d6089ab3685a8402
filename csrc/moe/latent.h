// latent_moe_front: logits = router x, z = fc1 x, shared = act(shared_up x);
// latent_moe_tail: fc2 y + shared_down shared + residual. The products before and behind a LatentMoE layer's experts.
#pragma once
#include <optional>
#include <string>

#include "../common/check.h"

namespace n3::latent_moe {

constexpr const char* front_op = "latent_moe_front";
constexpr const char* tail_op = "latent_moe_tail";

using OptionalTensor = std::optional<Tensor>;

struct FrontSizes {
  int64_t tokens, width, experts, latent, inner;  // latent: 0 without fc1
  bool gated;
};

inline void check_columns(const char* name, const Tensor& w, int64_t width) {
  check_dim(front_op, name, w, 2);
  check_shape(front_op, name, w, {w.size(0), width});
}

inline FrontSizes check_front(const Tensor& x, const Tensor& router_weight, const OptionalTensor& fc1,
                              const Tensor& shared_up, const std::string& activation) {
  check_floating(front_op, "x", x.scalar_type());
  check_dim(front_op, "x", x, 2);
  const bool gated = activation != "relu2";
  N3_CHECK(front_op, !gated || activation == "silu" || activation == "gelu",
           "activation must be one of relu2, silu, gelu, got ", activation);
  const int64_t width = x.size(1);
  check_floating(front_op, "router_weight", router_weight.scalar_type());
  check_columns("router_weight", router_weight, width);
  if (fc1) {
    check_same_dtype(front_op, "fc1", *fc1, "x", x);
    check_columns("fc1", *fc1, width);
  }
  check_same_dtype(front_op, "shared_up", shared_up, "x", x);
  check_columns("shared_up", shared_up, width);
  const int64_t rows = shared_up.size(0);
  N3_CHECK(front_op, !gated || rows % 2 == 0, "shared_up must have an even number of rows for ", activation, ", got ",
           rows);
  check_same_device(front_op, "router_weight", router_weight, "x", x);
  if (fc1) check_same_device(front_op, "fc1", *fc1, "x", x);
  check_same_device(front_op, "shared_up", shared_up, "x", x);
  return {x.size(0), width, router_weight.size(0), fc1 ? fc1->size(0) : 0, gated ? rows / 2 : rows, gated};
}

struct TailSizes {
  int64_t tokens, width, latent, inner;  // latent: 0 without fc2
};

inline TailSizes check_tail(const Tensor& y, const OptionalTensor& fc2, const Tensor& shared, const Tensor& shared_down,
                            const OptionalTensor& residual) {
  check_floating(tail_op, "y", y.scalar_type());
  check_dim(tail_op, "y", y, 2);
  check_same_dtype(tail_op, "shared_down", shared_down, "y", y);
  check_dim(tail_op, "shared_down", shared_down, 2);
  const int64_t tokens = y.size(0), width = shared_down.size(0), inner = shared_down.size(1);
  if (fc2) {
    check_same_dtype(tail_op, "fc2", *fc2, "y", y);
    check_shape(tail_op, "fc2", *fc2, {width, y.size(1)});
  } else {
    check_shape(tail_op, "y", y, {tokens, width});
  }
  check_same_dtype(tail_op, "shared", shared, "y", y);
  check_shape(tail_op, "shared", shared, {tokens, inner});
  if (residual) {
    check_same_dtype(tail_op, "residual", *residual, "y", y);
    check_shape(tail_op, "residual", *residual, {tokens, width});
  }
  if (fc2) check_same_device(tail_op, "fc2", *fc2, "y", y);
  check_same_device(tail_op, "shared", shared, "y", y);
  check_same_device(tail_op, "shared_down", shared_down, "y", y);
  if (residual) check_same_device(tail_op, "residual", *residual, "y", y);
  return {tokens, width, fc2 ? y.size(1) : 0, inner};
}

}  // namespace n3::latent_moe
