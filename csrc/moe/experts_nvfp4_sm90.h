// moe_experts with NVFP4 weights on sm_90a, for the launcher of the operator.
#pragma once
#include "experts_cuda.h"
#include "experts_nvfp4_plan.h"

namespace n3::moe_experts::sm90::nvfp4 {

struct Operands {
  const Tensor &w, &scale, &global;
};

// Why the kernel does not take these weights, or null: of rows of codes the copy engine wants each two to begin at a
// multiple of 16 bytes.
const char* unsupported(const Operands& up, const Operands& down);

// The slots' rows, float32 [plan().rows, width]; `plan` is nvfp4::plan.
Tensor run(const Params& p, const Plan& plan, const Tensor& x, const Operands& up, const Operands& down,
           const Sorted& sorted, cudaStream_t stream);

}  // namespace n3::moe_experts::sm90::nvfp4
