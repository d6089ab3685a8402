#include "route.h"

#include <mutex>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/element.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "route_lanes.h"

namespace n3::moe_route {

const Kernels kGenericKernels = kKernels;

namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

}  // namespace
}  // namespace n3::moe_route

namespace {

namespace route = n3::moe_route;
using n3::ScalarType;
using n3::Tensor;
using n3::element_of;
using n3::element_size;
using route::OptionalTensor;

constexpr int64_t kGrain = 1 << 14;  // logits of a thread at least: some 20 us

route::Options options_of(const route::Params& p) {
  return {p.experts, p.top_k, p.n_group, p.topk_group, p.softmax, p.normalize, p.scale};
}

int64_t grain(const route::Params& p) { return std::max<int64_t>(1, kGrain / p.experts); }

// Rows whose elements are neighbours; else a copy.
Tensor rows_of(const Tensor& t) { return t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

const char* row_of(const Tensor& t, int64_t row) {
  return static_cast<const char*>(t.const_data_ptr()) + row * t.stride(0) * element_size(t.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_route(const Tensor& logits, const OptionalTensor& bias,
                                                     const OptionalTensor& expert_map, int64_t top_k, int64_t n_group,
                                                     int64_t topk_group, const std::string& score, bool normalize,
                                                     double scale) {
  const route::Params p =
      route::check(logits, bias, expert_map, top_k, n_group, topk_group, score, normalize, scale);
  const Tensor rows = rows_of(logits);
  const auto dense = [](const OptionalTensor& t) { return t ? OptionalTensor(torch::stable::contiguous(*t)) : t; };
  const OptionalTensor b = dense(bias), map = dense(expert_map);
  const Tensor ids = torch::stable::new_empty(logits, {p.tokens, p.top_k}, ScalarType::Int);
  const Tensor weights = torch::stable::new_empty(logits, {p.tokens, p.top_k}, ScalarType::Float);
  const Tensor counts = torch::stable::new_empty(logits, {p.experts}, ScalarType::Int);
  const Tensor flags = torch::stable::new_empty(logits, {p.tokens}, ScalarType::Int);
  auto* count = static_cast<int32_t*>(counts.mutable_data_ptr());
  std::fill_n(count, p.experts, 0);

  route::Rows all{};
  all.stride = rows.stride(0);
  all.bias = b ? static_cast<const float*>(b->const_data_ptr()) : nullptr;
  all.expert_map = map ? static_cast<const int32_t*>(map->const_data_ptr()) : nullptr;
  all.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  all.weights = static_cast<float*>(weights.mutable_data_ptr());
  all.flags = static_cast<int32_t*>(flags.mutable_data_ptr());
  const route::Options options = options_of(p);
  const auto forward = route::kernels().forward[element_of(logits.scalar_type())];
  std::mutex adding;
  torch::stable::parallel_for(0, p.tokens, grain(p), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> of_thread(p.experts);
    route::Rows r = all;
    r.logits = row_of(rows, begin), r.tokens = end - begin, r.counts = of_thread.data();
    r.ids += begin * p.top_k, r.weights += begin * p.top_k, r.flags += begin;
    forward(options, r);
    const std::lock_guard lock(adding);
    for (int64_t e = 0; e < p.experts; ++e) count[e] += of_thread[e];
  });
  return {ids, weights, counts, flags};
}

Tensor moe_route_bwd(const Tensor& grad_weights, const Tensor& logits, const Tensor& ids, const std::string& score,
                     bool normalize, double scale) {
  const route::Params p = route::check_bwd(grad_weights, logits, ids, score, normalize, scale);
  const Tensor rows = rows_of(logits), slots = torch::stable::contiguous(ids);
  const auto* expert = static_cast<const int32_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < p.tokens * p.top_k; ++i) {
    N3_CHECK(route::bwd_op, expert[i] >= 0 && expert[i] < p.experts, "ids must be between 0 and ", p.experts - 1,
             ", got ", expert[i]);
  }
  const Tensor grad = torch::stable::new_empty(logits, {p.tokens, p.experts});
  const route::Options options = options_of(p);
  const auto backward = route::kernels().backward[element_of(logits.scalar_type())];
  const int64_t size = element_size(logits.scalar_type());
  torch::stable::parallel_for(0, p.tokens, grain(p), [&](int64_t begin, int64_t end) {
    route::BackwardRows r{};
    r.grad_strides[0] = grad_weights.stride(0), r.grad_strides[1] = grad_weights.stride(1);
    r.grad = static_cast<const float*>(grad_weights.const_data_ptr()) + begin * r.grad_strides[0];
    r.logits = row_of(rows, begin), r.stride = rows.stride(0), r.tokens = end - begin;
    r.ids = expert + begin * p.top_k;
    r.out = static_cast<char*>(grad.mutable_data_ptr()) + begin * p.experts * size;
    backward(options, r);
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_bwd", TORCH_BOX(&moe_route_bwd));
}
