#include <algorithm>
#include <string>

#include <torch/csrc/stable/library.h>

#include "grouped_linear.h"
#include "grouped_sm90.h"
#include "order_cuda.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace grouped = n3::grouped_linear;
namespace sm90 = n3::grouped_linear::sm90;
namespace nvfp4 = n3::moe_experts::sm90::nvfp4;
using grouped::OptionalTensor;

// Why these kernels do not take a call, or null; tensor_core_groups in n3kernels/moe/_supports.py asks first, in the
// same words.
const char* unsupported(const grouped::Params& p, const Tensor& x, const Tensor& w, const OptionalTensor& block_scale,
                        const OptionalTensor& global_scale) {
  if (x.scalar_type() == ScalarType::Float) {
    return "takes float16 and bfloat16 x, got float32: tensor cores would round it";
  }
  if (p.k < 8 || p.k % 8 || p.outputs < 8 || p.outputs % 8) {
    return "takes positive multiples of 8 columns of x and of the result";
  }
  if (p.groups > sm90::items::kMostExperts) return "takes up to 1024 groups";
  if (std::max(p.m, p.rows) >= int64_t(1) << 31) return "takes fewer than 2^31 rows";
  if (!p.dense) return nvfp4::unsupported({w, *block_scale, *global_scale});
  if (!sm90::in_rows(w)) return "takes weights whose rows are contiguous and begin at multiples of 16 bytes";
  return nullptr;
}

Tensor grouped_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, const OptionalTensor& gather,
                      const OptionalTensor& row_scale, const OptionalTensor& block_scale,
                      const OptionalTensor& global_scale, const std::optional<std::string>& activation) {
  const grouped::Params p =
      grouped::check(grouped::op, x, w, offsets, gather, row_scale, block_scale, global_scale, activation);
  const char* reason = unsupported(p, x, w, block_scale, global_scale);
  N3_CHECK(grouped::op, !reason, "the CUDA kernel ", reason);
  const n3::DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::new_empty(x, {p.rows, p.outputs}, x.scalar_type());
  if (p.rows == 0) return y;  // a grid of 0 blocks is a launch error
  const cudaStream_t stream = n3::current_stream(grouped::op, x);
  const Tensor rows = p.dense ? n3::aligned(x) : nvfp4::in_order(grouped::op, x, stream);
  const Tensor ends = torch::stable::contiguous(offsets);
  const auto dense = [](const OptionalTensor& t) -> OptionalTensor {
    return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
  };
  const OptionalTensor gathered = dense(gather), scales = dense(row_scale);
  const auto* bounds = static_cast<const int32_t*>(ends.const_data_ptr());
  const auto* sources = gathered ? static_cast<const int32_t*>(gathered->const_data_ptr()) : nullptr;
  const auto* gains = scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr;
  const sm90::Product product{rows, p.activation, p.rows, bounds, sources, 1, gains, sm90::To::kRows, nullptr,
                              y.mutable_data_ptr()};
  if (p.dense) {
    sm90::multiply(grouped::op, product, w, stream);
  } else {
    sm90::multiply(grouped::op, product, {w, *block_scale, *global_scale}, stream);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("grouped_linear", TORCH_BOX(&grouped_linear)); }
