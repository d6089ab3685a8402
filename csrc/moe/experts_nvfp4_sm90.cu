#include "experts_nvfp4_sm90.h"

#include "experts_nvfp4_sm90_kernel.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

void run(const Params& p, const Batch& batch, const PackedWeights& up, const PackedWeights& down) {
  const Tensor up_global = torch::stable::contiguous(up.global), down_global = torch::stable::contiguous(down.global);
  const Operands operands{scales_of(up.scale, up_global), scales_of(down.scale, down_global),
                          int32_t(pitch_of(up.codes)), int32_t(pitch_of(down.codes))};
  const Kernel kernel = kernel_for(p.width, p.activation != Activation::kRelu2);
  sm90::run<Packed, PackedRing>(p, kernel, batch, map_of(op, up.codes, 32), map_of(op, down.codes, 32), operands);
}

}  // namespace n3::moe_experts::sm90::nvfp4
