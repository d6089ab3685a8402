#include "sort.h"

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "sort_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace sort = n3::moe_sort;

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort(const Tensor& ids, int64_t num_experts, int64_t first_expert) {
  const sort::Params p = sort::check(ids, num_experts, first_expert);
  const n3::DeviceGuard guard(ids.get_device_index());
  const Tensor flat = torch::stable::contiguous(ids);
  const Tensor order = torch::stable::new_empty(ids, {p.slots}, ScalarType::Int);
  const Tensor offsets = torch::stable::new_empty(ids, {p.experts + 1}, ScalarType::Int);
  const Tensor active = torch::stable::new_empty(ids, {p.experts}, ScalarType::Int);
  const Tensor num_active = torch::stable::new_empty(ids, {1}, ScalarType::Int);
  const sort::Plan plan = sort::plan(p.slots, p.experts + 1);
  std::optional<Tensor> table;
  if (!plan.alone) table = torch::stable::new_empty(ids, {plan.chunks, p.experts + 1}, ScalarType::Int);
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const sort::Args a{static_cast<const int32_t*>(flat.const_data_ptr()), data(order), data(offsets), data(active),
                     data(num_active), table ? data(*table) : nullptr, p.slots, p.first, int32_t(p.experts),
                     int32_t(plan.chunks), int32_t(plan.size)};
  const cudaStream_t stream = n3::current_stream(sort::op, ids);
  if (plan.alone) {
    sort::alone_kernel<<<1, sort::kThreads, plan.chunks * (p.experts + 1) * sizeof(int32_t), stream>>>(a);
  } else {
    const auto blocks = uint32_t((plan.chunks + sort::kWarps - 1) / sort::kWarps);
    sort::count_kernel<<<blocks, 32 * sort::kWarps, 0, stream>>>(a);
    sort::add_kernel<<<1, sort::kThreads, 0, stream>>>(a);
    sort::place_kernel<<<blocks, 32 * sort::kWarps, 0, stream>>>(a);
  }
  N3_CUDA_CHECK(sort::op, cudaGetLastError());
  return {order, offsets, active, num_active};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("moe_sort", TORCH_BOX(&moe_sort)); }
