#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>

#include "../common/tensor_map.h"
#include "experts_nvfp4_sm90.h"
#include "experts_sm90_kernel.cuh"
#include "experts_wide_sm90.h"
#include "grouped_sm90.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace moe = n3::moe_experts;
namespace sm90 = n3::moe_experts::sm90;
using moe::OptionalTensor;
using n3::grouped_linear::sm90::in_rows;

// Why these kernels do not take a call, or null; decode_experts in n3kernels/moe/_supports.py asks first, in the same
// words.
const char* unsupported(const moe::Params& p, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return "takes bfloat16 x, got float32: tensor cores would round it";
  if (x.scalar_type() == ScalarType::Half) return "takes bfloat16 x, got float16: relu2 may pass 65504";
  const bool wide = sm90::is_wide(p);
  if (p.width < 8 || p.width % 8 || (p.width > sm90::kMostWidth && !wide)) {
    return wide ? "takes positive multiples of 8 columns of x" : "takes x of 8 to 3584 columns, a multiple of 8";
  }
  if (p.inner < 8 || p.inner % 8) return "takes an inner size that is a positive multiple of 8";
  if (p.experts > sm90::kMostExperts) return "takes up to 1024 experts";
  if (p.top_k > sm90::kMostSlots * sm90::kMostExperts) return "takes up to 65536 slots per token";
  return nullptr;
}

// [experts, rows, columns] in boxes of 64 rows and 64 columns.
CUtensorMap map_of(const Tensor& w) {
  return n3::tensor_map(moe::op, ScalarType::BFloat16, w.const_data_ptr(), {w.size(2), w.size(1), w.size(0), 1},
                        {w.stride(1), w.stride(0), 0}, {64, 64, 1, 1});
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
  }
  if (!reason && !p.dense) reason = sm90::nvfp4::unsupported({w_up, *up_scale, *up_global});
  if (!reason && !p.dense) reason = sm90::nvfp4::unsupported({w_down, *down_scale, *down_global});
  N3_CHECK(moe::op, !reason, "the CUDA kernel ", reason);
  const n3::DeviceGuard guard(x.get_device_index());
  if (p.tokens == 0 || p.first_expert > INT32_MAX) {  // a grid of 0 blocks is a launch error; no id is so large
    return torch::stable::new_zeros(x, {p.tokens, p.width}, p.y_dtype);
  }
  const Tensor y = torch::stable::new_empty(x, {p.tokens, p.width}, p.y_dtype);
  const cudaStream_t stream = n3::current_stream(moe::op, x);
  if (sm90::is_wide(p)) {
    sm90::run_wide(p, x, {w_up, up_scale, up_global}, {w_down, down_scale, down_global}, ids, weights, valid_tokens, y,
                   stream);
    return y;
  }
  const Tensor tokens = n3::aligned(x), slots = torch::stable::contiguous(ids);
  const Tensor gains = torch::stable::contiguous(weights);
  const sm90::Batch batch{tokens, slots, gains, y, valid_tokens, stream};
  if (p.dense) {
    sm90::run<sm90::Dense, sm90::DenseRing>(p, sm90::kernel_for(p.width), batch, map_of(w_up), map_of(w_down),
                                            sm90::DenseOperands{});
  } else {
    sm90::nvfp4::run(p, batch, {w_up, *up_scale, *up_global}, {w_down, *down_scale, *down_global});
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("moe_experts", TORCH_BOX(&moe_experts)); }
