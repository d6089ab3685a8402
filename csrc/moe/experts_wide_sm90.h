// moe_experts on sm_90a for many slots per expert: two grouped products and the ordered sum.
#pragma once
#include "experts_cuda.h"
#include "nvfp4_operands.h"

namespace n3::moe_experts::sm90 {

// The weights of one side: dense, or NVFP4 with scales.
struct WideWeights {
  const Tensor& w;
  const OptionalTensor &scale, &global;

  nvfp4::PackedWeights packed() const { return {w, *scale, *global}; }
};

// Whether it serves, and not the kernel for few: beyond 64 slots per expert on average, products and not memory bound
// the time. In batch-invariant mode that kernel serves any number.
bool is_wide(const Params& p);

// Writes y [tokens, width] of at least one slot. x is bfloat16, width and inner size are multiples of 8, and the copy
// engine can read the weights.
void run_wide(const Params& p, const Tensor& x, const WideWeights& up, const WideWeights& down, const Tensor& ids,
              const Tensor& weights, const OptionalTensor& valid_tokens, const Tensor& y, cudaStream_t stream);

}  // namespace n3::moe_experts::sm90
