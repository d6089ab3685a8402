// moe_experts with NVFP4 weights on sm_90a, for the launcher of the operator.
#pragma once
#include "experts_launch_sm90.cuh"
#include "nvfp4_operands.h"

namespace n3::moe_experts::sm90::nvfp4 {

void run(const Params& p, const Batch& batch, const PackedWeights& up, const PackedWeights& down);

}  // namespace n3::moe_experts::sm90::nvfp4
