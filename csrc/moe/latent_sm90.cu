#include <string>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>

#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "latent.h"
#include "latent_sm90_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
using n3::device::BF16;
namespace latent = n3::latent_moe;
namespace sm90 = n3::latent_moe::sm90;
using latent::front_op;
using latent::OptionalTensor;
using latent::tail_op;

int64_t element_bytes(const Tensor& w) { return w.scalar_type() == ScalarType::Float ? 4 : 2; }

// What the copy engine reads: rows that begin at multiples of 16 bytes.
bool in_rows(const Tensor& w) {
  return w.stride(1) == 1 && reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 16 == 0 &&
         (w.size(0) <= 1 || (w.stride(0) > 0 && w.stride(0) * element_bytes(w) % 16 == 0));
}
bool in_rows(const OptionalTensor& w) { return !w || in_rows(*w); }

// Why these kernels do not take a call, or null; latent_front and latent_tail in n3kernels/moe/_supports.py ask first,
// in the same words.
const char* unsupported_tokens(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return "takes bfloat16, got float32: tensor cores would round it";
  if (x.scalar_type() == ScalarType::Half) {
    return "takes bfloat16, got float16, in whose range float32 router weights have no exact terms";
  }
  if (x.size(0) > sm90::kMostTokens && !n3::batch_invariant()) {
    return "takes up to 512 tokens: beyond, products and not memory bound the time";
  }
  return nullptr;
}

const char* unsupported(const latent::FrontSizes& s, const Tensor& x, const Tensor& router, const OptionalTensor& fc1,
                        const Tensor& up) {
  if (const char* reason = unsupported_tokens(x)) return reason;
  if (s.gated) return "takes relu2, not the gated activations";
  if (router.scalar_type() == ScalarType::Half) return "takes float32 and bfloat16 router weights, got float16";
  if (s.width < 8 || s.width % 8) return "takes a width that is a positive multiple of 8";
  if (!in_rows(router) || !in_rows(fc1) || !in_rows(up)) {
    return "takes weights whose rows are contiguous and begin at multiples of 16 bytes";
  }
  return nullptr;
}

const char* unsupported(const latent::TailSizes& s, const Tensor& y, const OptionalTensor& fc2, const Tensor& down) {
  if (const char* reason = unsupported_tokens(y)) return reason;
  if ((fc2 && s.latent < 8) || s.latent % 8 || s.inner < 8 || s.inner % 8) {
    return "takes latent and inner sizes that are positive multiples of 8";
  }
  if (!in_rows(fc2) || !in_rows(down)) {
    return "takes weights whose rows are contiguous and begin at multiples of 16 bytes";
  }
  return nullptr;
}

// [rows, columns], seen as 16-bit units, in boxes of 64 of them and `rows` rows.
CUtensorMap map_of(const char* op, const Tensor& t, int rows) {
  const int64_t units = element_bytes(t) / 2;
  return n3::tensor_map(op, ScalarType::BFloat16, t.const_data_ptr(), {units * t.size(1), t.size(0), 1, 1},
                        {units * t.stride(0), 0, 0}, {64, rows, 1, 1});
}

// A term of the kernel's products; of weights without rows there is no map, and nobody asks for it.
template <typename Form>
void add_weights(const char* op, int index, const Tensor& w, int rows, sm90::Maps& maps, Form& form) {
  if (w.size(0) == 0) return;
  const int64_t bytes = element_bytes(w);
  form.weights[index] = {static_cast<const char*>(w.const_data_ptr()), w.stride(0) * bytes, int32_t(w.size(0)),
                         int32_t(w.size(1) * bytes)};
  maps.weights[index] = map_of(op, w, rows);
}

template <typename Form>
void launch(const char* op, const sm90::Plan& plan, const sm90::Maps& maps, const Form& form, const Tensor& x) {
  const sm90::Problem<Form> problem{plan.work, int32_t(x.size(0)), form};
  sm90::with_tile(plan.tokens, [&](auto* type) {
    const auto kernel = sm90::tensor_latent_kernel_sm90<std::remove_pointer_t<decltype(type)>, Form>;
    N3_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared));
    n3::launch_overlapping(op, kernel, {plan.blocks, plan.threads, plan.shared, plan.work.cluster},
                           n3::current_stream(op, x), maps, problem);
  });
}

BF16* data_of(const Tensor& t) { return static_cast<BF16*>(t.mutable_data_ptr()); }
const BF16* data_of(const OptionalTensor& t) { return t ? static_cast<const BF16*>(t->const_data_ptr()) : nullptr; }

std::tuple<Tensor, Tensor, Tensor> latent_moe_front(const Tensor& x, const Tensor& router_weight,
                                                    const OptionalTensor& fc1, const Tensor& shared_up,
                                                    const std::string& activation) {
  const latent::FrontSizes s = latent::check_front(x, router_weight, fc1, shared_up, activation);
  const char* reason = unsupported(s, x, router_weight, fc1, shared_up);
  N3_CHECK(front_op, !reason, "the CUDA kernel ", reason);
  const n3::DeviceGuard guard(x.get_device_index());
  const Tensor logits = torch::stable::new_empty(x, {s.tokens, s.experts}, ScalarType::Float);
  const Tensor z = torch::stable::new_empty(x, {s.tokens, s.latent});
  const Tensor shared = torch::stable::new_empty(x, {s.tokens, s.inner});
  const bool wide = router_weight.scalar_type() == ScalarType::Float;
  const sm90::Plan plan =
      sm90::front_plan(s.tokens, s.width, s.experts, s.latent, s.inner, wide, n3::batch_invariant());
  if (plan.blocks == 0) return {logits, z, shared};  // a grid of 0 blocks is a launch error
  const Tensor tokens = n3::aligned(x);
  sm90::Maps maps = {};
  sm90::Front form{{}, static_cast<float*>(logits.mutable_data_ptr()), data_of(z), data_of(shared), wide};
  add_weights(front_op, 0, router_weight, plan.rows, maps, form);
  if (fc1) add_weights(front_op, 1, *fc1, plan.rows, maps, form);
  add_weights(front_op, 2, shared_up, plan.rows, maps, form);
  maps.tokens[0] = map_of(front_op, tokens, plan.tokens);
  launch(front_op, plan, maps, form, tokens);
  return {logits, z, shared};
}

Tensor latent_moe_tail(const Tensor& y, const OptionalTensor& fc2, const Tensor& shared, const Tensor& shared_down,
                       const OptionalTensor& residual) {
  const latent::TailSizes s = latent::check_tail(y, fc2, shared, shared_down, residual);
  const char* reason = unsupported(s, y, fc2, shared_down);
  N3_CHECK(tail_op, !reason, "the CUDA kernel ", reason);
  const n3::DeviceGuard guard(y.get_device_index());
  const Tensor out = torch::stable::new_empty(y, {s.tokens, s.width});
  const sm90::Plan plan = sm90::tail_plan(s.tokens, s.width, s.latent, s.inner, n3::batch_invariant());
  if (plan.blocks == 0) return out;  // a grid of 0 blocks is a launch error
  const Tensor routed = n3::aligned(y), inner = n3::aligned(shared);
  OptionalTensor carried;
  if (residual) carried = torch::stable::contiguous(*residual);
  sm90::Maps maps = {};
  sm90::Tail form{{}, fc2 ? nullptr : data_of(routed), data_of(carried), data_of(out),
                  sm90::ceil_div(s.latent, 64)};
  if (fc2) {
    add_weights(tail_op, 0, *fc2, plan.rows, maps, form);
    maps.tokens[0] = map_of(tail_op, routed, plan.tokens);
  }
  add_weights(tail_op, 1, shared_down, plan.rows, maps, form);
  maps.tokens[1] = map_of(tail_op, inner, plan.tokens);
  launch(tail_op, plan, maps, form, routed);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("latent_moe_front", TORCH_BOX(&latent_moe_front));
  m.impl("latent_moe_tail", TORCH_BOX(&latent_moe_tail));
}
