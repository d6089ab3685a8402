// The steps of moe_experts on CUDA around the products, for the launchers: whose slots count, sorted, and their sum.
#pragma once
#include "../common/cuda.h"
#include "experts.h"
#include "experts_plan.h"

namespace n3::moe_experts {

struct Sorted {
  Tensor ids;             // [tokens, top_k]: those of padding rows are -1
  Tensor order, offsets;  // what moe_sort says of them
};

// By the operator moe_sort: whichever backend serves it. Nothing waits for the device.
Sorted sort_slots(const Params& p, const Tensor& ids, const OptionalTensor& valid_tokens, cudaStream_t stream);

// y[t] = sum_j weights[t, j] (sum_r rows[t, j, r]) in bfloat16; `parts` rows per slot, in float32.
void combine(const Params& p, const Tensor& rows, int32_t parts, const Tensor& weights, const Tensor& ids,
             const Tensor& y, cudaStream_t stream);

}  // namespace n3::moe_experts
