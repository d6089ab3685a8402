// moe_sort: the slots of a routing grouped by local expert id - first_expert, ascending in each group, those of other
// experts last; the groups' bounds, and the experts that have any.
#pragma once
#include "../common/check.h"

namespace n3::moe_sort {

constexpr const char* op = "moe_sort";

struct Params {
  int64_t slots, experts, first;
};

// Checks one call, for CPU and CUDA alike.
inline Params check(const Tensor& ids, int64_t num_experts, int64_t first_expert) {
  check_dtype(op, "ids", ids, ScalarType::Int);
  check_dim(op, "ids", ids, 2);
  N3_CHECK(op, ids.size(1) >= 1, "ids must have at least 1 column, got ", ids.size(1));
  N3_CHECK(op, ids.numel() < int64_t(1) << 31, "ids must have fewer than 2147483648 elements, got ", ids.numel());
  N3_CHECK(op, num_experts >= 1, "num_experts must be at least 1, got ", num_experts);
  N3_CHECK(op, first_expert >= 0, "first_expert must be at least 0, got ", first_expert);
  return {ids.numel(), num_experts, first_expert};
}

}  // namespace n3::moe_sort
