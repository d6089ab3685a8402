#include "experts_nvfp4_sm90.h"

#include <type_traits>

#include "../common/tensor_map.h"
#include "experts_nvfp4_sm90_kernel.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

namespace {

bool in_pairs(const Tensor& w) {
  const auto fits = [&w](int dim, int64_t bytes) {
    return w.size(dim) <= 1 || (w.stride(dim) > 0 && w.stride(dim) % bytes == 0);
  };
  return w.stride(2) == 1 && fits(1, 8) && fits(0, 16) && reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 16 == 0;
}

// [experts, rows / 2, two rows as pairs of bytes] in boxes of 32 rows of one parity and 64 bytes.
CUtensorMap map_of(const Tensor& w) {
  const int64_t pitch = w.stride(1) / 2;
  return tensor_map(op, ScalarType::BFloat16, w.const_data_ptr(),
                    {pitch + w.size(2) / 2, w.size(1) / 2, w.size(0), 1}, {2 * pitch, w.stride(0) / 2, 0},
                    {32, 32, 1, 1});
}

Scales scales_of(const Tensor& scale, const Tensor& global) {
  return {static_cast<const uint8_t*>(scale.const_data_ptr()), scale.stride(0), scale.stride(1),
          static_cast<const float*>(global.const_data_ptr())};
}

}  // namespace

const char* unsupported(const Operands& up, const Operands& down) {
  for (const Operands* side : {&up, &down}) {
    if (!in_pairs(side->w)) {
      return "takes codes whose rows are contiguous, each two beginning at a multiple of 16 bytes";
    }
    if (side->scale.size(2) > 1 && side->scale.stride(2) != 1) return "takes scales whose rows are contiguous";
  }
  return nullptr;
}

Tensor run(const Params& p, const Plan& plan, const Tensor& x, const Operands& up, const Operands& down,
           const Sorted& sorted, cudaStream_t stream) {
  const Tensor tokens = aligned(x), rows = torch::stable::new_empty(x, {plan.rows, p.width}, ScalarType::Float);
  const Tensor up_global = torch::stable::contiguous(up.global), down_global = torch::stable::contiguous(down.global);
  const Problem problem{plan.work,
                        static_cast<const device::BF16*>(tokens.const_data_ptr()),
                        static_cast<const int32_t*>(sorted.order.const_data_ptr()),
                        static_cast<const int32_t*>(sorted.offsets.const_data_ptr()),
                        static_cast<float*>(rows.mutable_data_ptr()),
                        scales_of(up.scale, up_global),
                        scales_of(down.scale, down_global),
                        int32_t(up.w.stride(1) / 2),
                        int32_t(down.w.stride(1) / 2),
                        int32_t(p.width),
                        int32_t(p.inner),
                        int32_t(p.top_k)};
  const CUtensorMap up_map = map_of(up.w), down_map = map_of(down.w);
  with_tile(plan.kernel, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    const auto kernel = tensor_experts_nvfp4_kernel_sm90<Tile>;
    N3_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
    kernel<<<uint32_t(plan.blocks), kThreads, plan.shared, stream>>>(up_map, down_map, problem);
    N3_CUDA_CHECK(op, cudaGetLastError());
  });
  return rows;
}

}  // namespace n3::moe_experts::sm90::nvfp4
