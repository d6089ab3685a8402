// moe_experts: y[t] = sum_j weights[t, j] * W_down[e] act(W_up[e] x[t]) with e = ids[t, j] - first_expert, j ascending.
// Slots of other experts and rows from valid_tokens on are not read and add exactly 0.
#pragma once
#include <optional>
#include <string>
#include <utility>

#include "../common/check.h"

namespace n3::moe_experts {

constexpr const char* op = "moe_experts";

enum class Activation { kRelu2, kSilu, kGelu };  // relu2 stands alone; silu and gelu gate: act(first half) * second

// The experts' weights of one side: dense [experts, n, k], or NVFP4 codes [experts, n, k / 2] with their scales.
struct Weights {
  const void* w;
  const uint8_t* block_scale;  // [experts, n, k / 16]; null: dense
  const float* global_scale;   // [experts]
  int64_t n, k;
};

struct Params {
  const void* x;  // [tokens, width]
  Weights up, down;
  const int32_t* ids;           // [tokens, top_k]
  const float* weights;         // [tokens, top_k]
  const int32_t* valid_tokens;  // [1] or null
  void* y;                      // [tokens, width] in y_dtype
  int64_t tokens, top_k, experts, width, inner;
  int64_t first_expert;
  Activation activation;
  ScalarType y_dtype;
  bool dense;
};

using OptionalTensor = std::optional<Tensor>;

inline Activation check_activation(const std::string& name) {
  if (name == "relu2") return Activation::kRelu2;
  if (name == "silu") return Activation::kSilu;
  N3_CHECK(op, name == "gelu", "activation must be one of relu2, silu, gelu, got ", name);
  return Activation::kGelu;
}

inline void check_nvfp4(const std::string& side, const Tensor& w, const Tensor& block_scale, const Tensor& global_scale,
                        int64_t experts, int64_t n, int64_t k) {
  const std::string q_name = "w_" + side, scale_name = side + "_scale", global_name = side + "_global";
  check_dtype(op, q_name.c_str(), w, ScalarType::Byte);
  check_shape(op, q_name.c_str(), w, {experts, n, k / 2});
  check_dtype(op, scale_name.c_str(), block_scale, ScalarType::Float8_e4m3fn);
  check_shape(op, scale_name.c_str(), block_scale, {experts, n, k / 16});
  check_dtype(op, global_name.c_str(), global_scale, ScalarType::Float);
  check_shape(op, global_name.c_str(), global_scale, {experts});
}

// Checks the weights, dense or NVFP4; returns the inner size and whether they are dense.
inline std::pair<int64_t, bool> check_weights(const Tensor& x, const Tensor& w_up, const Tensor& w_down,
                                              Activation activation, const OptionalTensor& up_scale,
                                              const OptionalTensor& up_global, const OptionalTensor& down_scale,
                                              const OptionalTensor& down_global) {
  const int given = up_scale.has_value() + up_global.has_value() + down_scale.has_value() + down_global.has_value();
  N3_CHECK(op, given == 0 || given == 4,
           "up_scale, up_global, down_scale and down_global must be given together or not at all, got ", given,
           " of 4");
  check_dim(op, "w_up", w_up, 3);
  check_dim(op, "w_down", w_down, 3);
  const int64_t experts = w_up.size(0), halves = activation == Activation::kRelu2 ? 1 : 2, width = x.size(1);
  N3_CHECK(op, experts >= 1, "w_up must have at least 1 expert, got ", experts);
  if (!given) {
    const int64_t inner = w_down.size(2);
    check_same_dtype(op, "w_up", w_up, "x", x);
    check_shape(op, "w_up", w_up, {experts, halves * inner, width});
    check_same_dtype(op, "w_down", w_down, "x", x);
    check_shape(op, "w_down", w_down, {experts, width, inner});
    return {inner, true};
  }
  const int64_t inner = 2 * w_down.size(2);
  N3_CHECK(op, width > 0 && width % 16 == 0, "the last dimension of x must be a positive multiple of 16, got ", width);
  N3_CHECK(op, inner > 0 && inner % 16 == 0,
           "w_down must have a last dimension that is a positive multiple of 8, got ", w_down.size(2));
  check_nvfp4("up", w_up, *up_scale, *up_global, experts, halves * inner, width);
  check_nvfp4("down", w_down, *down_scale, *down_global, experts, width, inner);
  return {inner, false};
}

// Checks one call, for CPU and CUDA alike; returns the problem with null pointers.
inline Params check(const Tensor& x, const Tensor& w_up, const Tensor& w_down, const Tensor& ids, const Tensor& weights,
                    const OptionalTensor& up_scale, const OptionalTensor& up_global, const OptionalTensor& down_scale,
                    const OptionalTensor& down_global, const OptionalTensor& valid_tokens,
                    const std::string& activation, int64_t first_expert, std::optional<ScalarType> out_dtype) {
  check_floating(op, "x", x.scalar_type());
  check_dim(op, "x", x, 2);
  const Activation act = check_activation(activation);
  const auto [inner, dense] = check_weights(x, w_up, w_down, act, up_scale, up_global, down_scale, down_global);
  const int64_t tokens = x.size(0), width = x.size(1), experts = w_up.size(0);
  check_dtype(op, "ids", ids, ScalarType::Int);
  check_dim(op, "ids", ids, 2);
  const int64_t top_k = ids.size(1);
  N3_CHECK(op, top_k >= 1, "ids must have at least 1 column, got ", top_k);
  check_shape(op, "ids", ids, {tokens, top_k});
  N3_CHECK(op, ids.numel() < int64_t(1) << 31, "ids must have fewer than 2147483648 elements, got ", ids.numel());
  check_dtype(op, "weights", weights, ScalarType::Float);
  check_shape(op, "weights", weights, {tokens, top_k});
  N3_CHECK(op, first_expert >= 0, "first_expert must be at least 0, got ", first_expert);
  const ScalarType y_dtype = out_dtype.value_or(x.scalar_type());
  N3_CHECK(op, y_dtype == x.scalar_type() || y_dtype == ScalarType::Float,
           "out_dtype must be float32 or the dtype of x (", dtype_name(x.scalar_type()), "), got ",
           dtype_name(y_dtype));
  if (valid_tokens) {
    check_dtype(op, "valid_tokens", *valid_tokens, ScalarType::Int);
    check_shape(op, "valid_tokens", *valid_tokens, {1});
  }
  check_same_device(op, "w_up", w_up, "x", x);
  check_same_device(op, "w_down", w_down, "x", x);
  check_same_device(op, "ids", ids, "x", x);
  check_same_device(op, "weights", weights, "x", x);
  if (up_scale) check_same_device(op, "up_scale", *up_scale, "x", x);
  if (up_global) check_same_device(op, "up_global", *up_global, "x", x);
  if (down_scale) check_same_device(op, "down_scale", *down_scale, "x", x);
  if (down_global) check_same_device(op, "down_global", *down_global, "x", x);
  if (valid_tokens) check_same_device(op, "valid_tokens", *valid_tokens, "x", x);
  const int64_t up_rows = act == Activation::kRelu2 ? inner : 2 * inner;
  Params p{};
  p.up.n = up_rows, p.up.k = p.down.n = p.width = width, p.down.k = p.inner = inner;
  p.tokens = tokens, p.top_k = top_k, p.experts = experts, p.first_expert = first_expert;
  p.activation = act, p.y_dtype = y_dtype, p.dense = dense;
  return p;
}

}  // namespace n3::moe_experts
