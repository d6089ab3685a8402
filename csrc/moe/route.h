// moe_route: the top_k experts of largest choice = score(logits) + bias, and their weights; moe_route_bwd: the weights'
// gradient. Scores are computed in float64 and rounded once to float32, so that every backend chooses the same experts:
//
//   score = 1 / (1 + e^-x)   or   e^(x - max) / sum e^(x - max) over the row      choice = score + bias, NaN: -inf
//   weights = scale * s / (sum(s) + 1e-20) of the chosen scores s (NaN: 0), summed in float32 in the order of choice
//
// Backward, with g = grad_weights * scale, total = sum(s) + 1e-20 and, where normalised, g = (g - sum(g s) / total) /
// total, g = 0 for the experts that were not chosen:
//
//   sigmoid: g s (1 - s)     softmax: s (g - sum(g s)) over all experts
#pragma once
#include <algorithm>
#include <optional>
#include <string>

#include "../common/check.h"
#include "route_plan.h"

namespace n3::moe_route {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = "moe_route";
constexpr const char* bwd_op = "moe_route_bwd";

struct Params {
  int64_t tokens, experts, top_k, n_group, topk_group;
  bool softmax, normalize;
  float scale;
};

inline bool check_score(const char* name, const std::string& score) {
  N3_CHECK(name, score == "sigmoid" || score == "softmax", "score must be one of sigmoid, softmax, got ", score);
  return score == "softmax";
}

// [T, E], as both operators take it.
inline void check_logits(const char* name, const Tensor& logits) {
  check_floating(name, "logits", logits.scalar_type());
  check_dim(name, "logits", logits, 2);
  const int64_t experts = logits.size(1);
  N3_CHECK(name, experts >= 1 && experts <= kMaxExperts, "logits must have 1 to ", kMaxExperts, " columns, got ",
           experts);
}

// Checks one call, for CPU and CUDA alike.
inline Params check(const Tensor& logits, const OptionalTensor& bias, const OptionalTensor& expert_map, int64_t top_k,
                    int64_t n_group, int64_t topk_group, const std::string& score, bool normalize, double scale) {
  check_logits(op, logits);
  const int64_t experts = logits.size(1);
  const bool softmax = check_score(op, score);
  if (bias) {
    check_dtype(op, "bias", *bias, ScalarType::Float);
    check_shape(op, "bias", *bias, {experts});
  }
  N3_CHECK(op, n_group >= 1 && experts % n_group == 0, "n_group must divide the ", experts, " experts, got ", n_group);
  N3_CHECK(op, topk_group >= 1 && topk_group <= n_group, "topk_group must be between 1 and n_group ", n_group, ", got ",
           topk_group);
  const int64_t most = std::min<int64_t>(kMaxTopK, topk_group * (experts / n_group));
  N3_CHECK(op, top_k >= 1 && top_k <= most, "top_k must be between 1 and ", most, ", got ", top_k);
  if (expert_map) {
    check_dtype(op, "expert_map", *expert_map, ScalarType::Int);
    check_shape(op, "expert_map", *expert_map, {experts});
  }
  if (bias) check_same_device(op, "bias", *bias, "logits", logits);
  if (expert_map) check_same_device(op, "expert_map", *expert_map, "logits", logits);
  return {logits.size(0), experts, top_k, n_group, topk_group, softmax, normalize, float(scale)};
}

// The same for the gradient; the values of ids are looked at where they are used.
inline Params check_bwd(const Tensor& grad_weights, const Tensor& logits, const Tensor& ids, const std::string& score,
                        bool normalize, double scale) {
  check_logits(bwd_op, logits);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const bool softmax = check_score(bwd_op, score);
  check_dtype(bwd_op, "ids", ids, ScalarType::Int);
  check_dim(bwd_op, "ids", ids, 2);
  const int64_t top_k = ids.size(1), most = std::min<int64_t>(kMaxTopK, experts);
  N3_CHECK(bwd_op, top_k >= 1 && top_k <= most, "ids must have 1 to ", most, " columns, got ", top_k);
  check_shape(bwd_op, "ids", ids, {tokens, top_k});
  check_dtype(bwd_op, "grad_weights", grad_weights, ScalarType::Float);
  check_shape(bwd_op, "grad_weights", grad_weights, {tokens, top_k});
  check_same_device(bwd_op, "grad_weights", grad_weights, "logits", logits);
  check_same_device(bwd_op, "ids", ids, "logits", logits);
  return {tokens, experts, top_k, 1, 1, softmax, normalize, float(scale)};
}

}  // namespace n3::moe_route
