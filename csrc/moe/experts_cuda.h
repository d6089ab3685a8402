// What the launchers of moe_experts on CUDA share: counters that blocks meet at; and the steps around products that are
// launches of their own, for the kernels of many tokens: slots sorted, and their sum.
#pragma once
#include "../common/cuda.h"
#include "experts.h"
#include "experts_plan.h"

namespace n3::moe_experts {

// Words that are zero when this stream's next kernel starts, and that it is to leave so. `owned` keeps them where the
// pool is used up: then they are new, and zeroed by a launch.
uint32_t* zero_counters(const Tensor& x, int64_t words, cudaStream_t stream, OptionalTensor& owned);

struct Sorted {
  Tensor ids;             // [tokens, top_k]: those of padding rows are -1
  Tensor order, offsets;  // what moe_sort says of them
};

// By the operator moe_sort: whichever backend serves it. Nothing waits for the device.
Sorted sort_slots(const Params& p, const Tensor& ids, const OptionalTensor& valid_tokens, cudaStream_t stream);

// y[t] = sum_j weights[t, j] (sum_r rows[t, j, r]), in p.y_dtype, bfloat16 or float32; `parts` rows per slot, in
// float32.
void combine(const Params& p, const Tensor& rows, int32_t parts, const Tensor& weights, const Tensor& ids,
             const Tensor& y, cudaStream_t stream);

}  // namespace n3::moe_experts
