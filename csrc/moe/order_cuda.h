// Rows in the order in which NVFP4 weights meet them on sm_90a.
#pragma once
#include <cuda_runtime.h>

#include "../common/check.h"

namespace n3::moe_experts::sm90::nvfp4 {

// x [rows, k], float16 or bfloat16, k a multiple of 16: [rows, k up to a multiple of 128], zeros behind k.
Tensor in_order(const char* op, const Tensor& x, cudaStream_t stream);

}  // namespace n3::moe_experts::sm90::nvfp4
