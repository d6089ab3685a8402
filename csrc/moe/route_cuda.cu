#include "route.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "route_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace route = n3::moe_route;
using route::OptionalTensor;

// Calls f with the kernel's element type and the experts of a lane.
template <typename T, typename F>
void with_lanes(int per_lane, F f) {
  switch (per_lane) {
    case 4: return f.template operator()<T, 4>();
    case 8: return f.template operator()<T, 8>();
    case 16: return f.template operator()<T, 16>();
    default: return f.template operator()<T, 32>();
  }
}

template <typename F>
void with_kernel(ScalarType dtype, int per_lane, F f) {
  switch (dtype) {  // the checks let nothing else through
    case ScalarType::Float: return with_lanes<float>(per_lane, f);
    case ScalarType::Half: return with_lanes<n3::device::F16>(per_lane, f);
    default: return with_lanes<n3::device::BF16>(per_lane, f);
  }
}

OptionalTensor dense(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : OptionalTensor();
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_route(const Tensor& logits, const OptionalTensor& bias,
                                                     const OptionalTensor& expert_map, int64_t top_k, int64_t n_group,
                                                     int64_t topk_group, const std::string& score, bool normalize,
                                                     double scale) {
  const route::Params p =
      route::check(logits, bias, expert_map, top_k, n_group, topk_group, score, normalize, scale);
  const n3::DeviceGuard guard(logits.get_device_index());
  const OptionalTensor b = dense(bias), map = dense(expert_map);
  const Tensor ids = torch::stable::new_empty(logits, {p.tokens, p.top_k}, ScalarType::Int);
  const Tensor weights = torch::stable::new_empty(logits, {p.tokens, p.top_k}, ScalarType::Float);
  const Tensor counts = torch::stable::new_empty(logits, {p.experts}, ScalarType::Int);
  const Tensor flags = torch::stable::new_empty(logits, {p.tokens}, ScalarType::Int);
  const cudaStream_t stream = n3::current_stream(route::op, logits);
  N3_CUDA_CHECK(route::op, cudaMemsetAsync(data<int32_t>(counts), 0, p.experts * sizeof(int32_t), stream));

  const route::Args a{
      logits.const_data_ptr(),
      {logits.stride(0), logits.stride(1)},
      b ? static_cast<const float*>(b->const_data_ptr()) : nullptr,
      map ? static_cast<const int32_t*>(map->const_data_ptr()) : nullptr,
      data<int32_t>(ids), data<float>(weights), data<int32_t>(counts), data<int32_t>(flags), p.tokens,
      int32_t(p.experts), int32_t(p.top_k), int32_t(p.n_group), int32_t(p.topk_group), p.softmax, p.normalize,
      p.scale};
  const route::Plan plan = route::plan(p.tokens, p.experts);
  if (plan.blocks > 0) {  // a grid of 0 blocks is a launch error
    with_kernel(logits.scalar_type(), plan.per_lane, [&]<typename T, int kPer>() {
      route::forward_kernel<T, kPer><<<uint32_t(plan.blocks), route::kThreads, 0, stream>>>(a);
    });
    N3_CUDA_CHECK(route::op, cudaGetLastError());
  }
  return {ids, weights, counts, flags};
}

Tensor moe_route_bwd(const Tensor& grad_weights, const Tensor& logits, const Tensor& ids, const std::string& score,
                     bool normalize, double scale) {
  const route::Params p = route::check_bwd(grad_weights, logits, ids, score, normalize, scale);
  const n3::DeviceGuard guard(logits.get_device_index());
  const Tensor slots = torch::stable::contiguous(ids);
  const Tensor grad = torch::stable::new_empty(logits, {p.tokens, p.experts});
  const route::BackwardArgs a{static_cast<const float*>(grad_weights.const_data_ptr()),
                              {grad_weights.stride(0), grad_weights.stride(1)},
                              logits.const_data_ptr(),
                              {logits.stride(0), logits.stride(1)},
                              static_cast<const int32_t*>(slots.const_data_ptr()),
                              grad.mutable_data_ptr(),
                              p.tokens, int32_t(p.experts), int32_t(p.top_k), p.softmax, p.normalize, p.scale};
  const route::Plan plan = route::plan(p.tokens, p.experts);
  if (plan.blocks == 0) return grad;
  const cudaStream_t stream = n3::current_stream(route::bwd_op, logits);
  const auto launch = [&](auto kernel) { kernel<<<uint32_t(plan.blocks), route::kThreads, 0, stream>>>(a); };
  switch (logits.scalar_type()) {
    case ScalarType::Float: launch(route::backward_kernel<float>); break;
    case ScalarType::Half: launch(route::backward_kernel<n3::device::F16>); break;
    default: launch(route::backward_kernel<n3::device::BF16>);
  }
  N3_CUDA_CHECK(route::bwd_op, cudaGetLastError());
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_bwd", TORCH_BOX(&moe_route_bwd));
}
