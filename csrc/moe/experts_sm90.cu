#include <string>
#include <type_traits>

#include <torch/csrc/stable/library.h>

#include "../common/tensor_map.h"
#include "experts_cuda.h"
#include "experts_nvfp4_sm90.h"
#include "experts_sm90_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace moe = n3::moe_experts;
namespace sm90 = n3::moe_experts::sm90;
using moe::OptionalTensor;

// What the copy engine reads: rows that begin at multiples of 16 bytes.
bool in_rows(const Tensor& w) {
  bool fit = w.stride(2) == 1 && reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 2; ++i) fit = fit && (w.size(i) <= 1 || (w.stride(i) > 0 && w.stride(i) % 8 == 0));
  return fit;
}

// Why these kernels do not take a call, or null; decode_experts in n3kernels/moe/_supports.py asks first, in the same
// words.
const char* unsupported(const moe::Params& p, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return "takes bfloat16 x, got float32: tensor cores would round it";
  if (x.scalar_type() == ScalarType::Half) return "takes bfloat16 x, got float16: relu2 may pass 65504";
  if (!p.dense && p.activation != moe::Activation::kRelu2) return "takes relu2 with NVFP4 weights, not the gated ones";
  if (p.width < 8 || p.width % 8 || p.width > sm90::kMostWidth) {
    return "takes x of 8 to 3584 columns, a multiple of 8";
  }
  if (p.inner < 8 || p.inner % 8) return "takes an inner size that is a positive multiple of 8";
  if (p.experts > sm90::kMostExperts) return "takes up to 1024 experts";
  if (p.tokens * p.top_k > sm90::kMostSlots * p.experts) {
    return "takes up to 64 slots per expert on average: beyond, products and not memory bound the time";
  }
  return nullptr;
}

// [experts, rows, columns] in boxes of 64 rows and 64 columns.
CUtensorMap map_of(const Tensor& w) {
  return n3::tensor_map(moe::op, ScalarType::BFloat16, w.const_data_ptr(), {w.size(2), w.size(1), w.size(0), 1},
                        {w.stride(1), w.stride(0), 0}, {64, 64, 1, 1});
}

Tensor run_dense(const moe::Params& p, const sm90::Plan& plan, const Tensor& x, const Tensor& w_up,
                 const Tensor& w_down, const moe::Sorted& sorted, cudaStream_t stream) {
  const Tensor tokens = n3::aligned(x), rows = torch::stable::new_empty(x, {plan.rows, p.width}, ScalarType::Float);
  const sm90::Problem problem{plan.work,
                              static_cast<const n3::device::BF16*>(tokens.const_data_ptr()),
                              static_cast<const int32_t*>(sorted.order.const_data_ptr()),
                              static_cast<const int32_t*>(sorted.offsets.const_data_ptr()),
                              static_cast<float*>(rows.mutable_data_ptr()),
                              int32_t(p.width),
                              int32_t(p.inner),
                              int32_t(p.top_k),
                              p.activation == moe::Activation::kGelu};
  const CUtensorMap up = map_of(w_up), down = map_of(w_down);
  sm90::with_tile(plan.kernel, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    const auto kernel = p.activation == moe::Activation::kRelu2 ? sm90::tensor_experts_kernel_sm90<Tile, false>
                                                                : sm90::tensor_experts_kernel_sm90<Tile, true>;
    N3_CUDA_CHECK(moe::op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
    kernel<<<uint32_t(plan.blocks), sm90::kThreads, plan.shared, stream>>>(up, down, problem);
    N3_CUDA_CHECK(moe::op, cudaGetLastError());
  });
  return rows;
}

Tensor moe_experts(const Tensor& x, const Tensor& w_up, const Tensor& w_down, const Tensor& ids, const Tensor& weights,
                   const OptionalTensor& up_scale, const OptionalTensor& up_global, const OptionalTensor& down_scale,
                   const OptionalTensor& down_global, const OptionalTensor& valid_tokens, const std::string& activation,
                   int64_t first_expert, std::optional<ScalarType> out_dtype) {
  const moe::Params p = moe::check(x, w_up, w_down, ids, weights, up_scale, up_global, down_scale, down_global,
                                   valid_tokens, activation, first_expert, out_dtype);
  const char* reason = unsupported(p, x);
  if (!reason && p.dense && (!in_rows(w_up) || !in_rows(w_down))) {
    reason = "takes weights whose rows are contiguous and begin at multiples of 16 bytes";
  } else if (!reason && !p.dense) {
    reason = sm90::nvfp4::unsupported({w_up, *up_scale, *up_global}, {w_down, *down_scale, *down_global});
  }
  N3_CHECK(moe::op, !reason, "the CUDA kernel ", reason);
  const n3::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = n3::current_stream(moe::op, x);
  const Tensor y = torch::stable::new_empty(x, {p.tokens, p.width}, ScalarType::BFloat16);
  if (p.tokens == 0) return y;  // a grid of 0 blocks is a launch error

  int sms;
  N3_CUDA_CHECK(moe::op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const auto choose = p.dense ? sm90::plan : sm90::nvfp4::plan;
  const sm90::Plan plan = choose(p.tokens, p.top_k, p.experts, p.width, p.inner, sms);
  const Tensor gains = torch::stable::contiguous(weights);
  const moe::Sorted sorted = moe::sort_slots(p, ids, valid_tokens, stream);
  const Tensor rows = p.dense ? run_dense(p, plan, x, w_up, w_down, sorted, stream)
                              : sm90::nvfp4::run(p, plan, x, {w_up, *up_scale, *up_global},
                                                 {w_down, *down_scale, *down_global}, sorted, stream);
  moe::combine(p, rows, sm90::rows_per_slot(plan.work), gains, sorted.ids, y, stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("moe_experts", TORCH_BOX(&moe_experts)); }
