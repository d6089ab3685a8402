#include <algorithm>
#include <string>
#include <type_traits>

#include <torch/csrc/stable/library.h>

#include "../common/tensor_map.h"
#include "grouped_linear.h"
#include "grouped_linear_sm90_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace grouped = n3::grouped_linear;
namespace sm90 = n3::grouped_linear::sm90;
using grouped::OptionalTensor;

// What the copy engine reads: rows that begin at multiples of 16 bytes.
bool in_rows(const Tensor& w) {
  bool fit = w.stride(2) == 1 && reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 2; ++i) fit = fit && (w.size(i) <= 1 || (w.stride(i) > 0 && w.stride(i) % 8 == 0));
  return fit;
}

// Why this kernel does not take a call, or null; tensor_core_groups in n3kernels/moe/_supports.py asks first, in the
// same words.
const char* unsupported(const grouped::Params& p, const Tensor& x, const Tensor& w) {
  if (x.scalar_type() == ScalarType::Float) {
    return "takes float16 and bfloat16 x, got float32: tensor cores would round it";
  }
  if (!p.dense) return "takes dense weights";
  if (p.outputs != p.n) return "takes relu2 or no activation, not the gated ones";
  if (p.k < 8 || p.k % 8 || p.n < 8 || p.n % 8) return "takes positive multiples of 8 rows and columns per group";
  if (p.groups > sm90::items::kMostExperts) return "takes up to 1024 groups";
  if (std::max(p.m, p.rows) >= int64_t(1) << 31) return "takes fewer than 2^31 rows";
  if (!in_rows(w)) return "takes weights whose rows are contiguous and begin at multiples of 16 bytes";
  return nullptr;
}

// The attribute first: it gives a new thread the device's context, without which the driver may make no map.
template <typename T>
void launch(const sm90::Problem& problem, const Tensor& w, int64_t blocks, cudaStream_t stream) {
  const auto kernel = sm90::tensor_grouped_kernel_sm90<T>;
  N3_CUDA_CHECK(grouped::op,
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sm90::Shared::kBytes));
  const CUtensorMap map = n3::tensor_map(grouped::op, w.scalar_type(), w.const_data_ptr(),
                                         {w.size(2), w.size(1), w.size(0), 1}, {w.stride(1), w.stride(0), 0},
                                         {64, 64, 1, 1});
  kernel<<<uint32_t(blocks), sm90::items::kThreads, sm90::Shared::kBytes, stream>>>(map, problem);
  N3_CUDA_CHECK(grouped::op, cudaGetLastError());
}

Tensor grouped_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, const OptionalTensor& gather,
                      const OptionalTensor& row_scale, const OptionalTensor& block_scale,
                      const OptionalTensor& global_scale, const std::optional<std::string>& activation) {
  const grouped::Params p =
      grouped::check(grouped::op, x, w, offsets, gather, row_scale, block_scale, global_scale, activation);
  const char* reason = unsupported(p, x, w);
  N3_CHECK(grouped::op, !reason, "the CUDA kernel ", reason);
  const n3::DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::new_empty(x, {p.rows, p.n}, x.scalar_type());
  if (p.rows == 0) return y;  // a grid of 0 blocks is a launch error
  int sms;
  N3_CUDA_CHECK(grouped::op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const sm90::Plan plan = sm90::plan(p.rows, p.groups, p.n, sms);
  const Tensor rows = n3::aligned(x), ends = torch::stable::contiguous(offsets);
  const auto dense = [](const OptionalTensor& t) -> OptionalTensor {
    return t ? OptionalTensor(torch::stable::contiguous(*t)) : t;
  };
  const OptionalTensor sources = dense(gather), scales = dense(row_scale);
  const sm90::Problem problem{plan.work,
                              rows.const_data_ptr(),
                              static_cast<const int32_t*>(ends.const_data_ptr()),
                              sources ? static_cast<const int32_t*>(sources->const_data_ptr()) : nullptr,
                              scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr,
                              y.mutable_data_ptr(),
                              int32_t(p.m),
                              int32_t(p.rows),
                              int32_t(p.n),
                              int32_t(p.k),
                              p.activation == grouped::Activation::kRelu2};
  const cudaStream_t stream = n3::current_stream(grouped::op, x);
  x.scalar_type() == ScalarType::Half ? launch<n3::device::F16>(problem, w, plan.blocks, stream)
                                      : launch<n3::device::BF16>(problem, w, plan.blocks, stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("grouped_linear", TORCH_BOX(&grouped_linear)); }
