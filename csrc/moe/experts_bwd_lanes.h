// The kernels of the experts' backward, compiled once per instruction set by a file that defines N3_LANES;
// experts_bwd_kernels.h states the arithmetic.
#pragma once
#include "experts_bwd_slots_lanes.h"
#include "experts_bwd_weights_lanes.h"

namespace n3::moe_bwd {
namespace {

constexpr Kernels kKernels = {
    block_floats,
    scratch_floats,
    {slots<float>, slots<Half>, slots<BFloat16>},
    weight_parts,
    sum_floats,
    {weights<float>, weights<Half>, weights<BFloat16>},
};

}  // namespace
}  // namespace n3::moe_bwd
