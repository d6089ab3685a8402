#include "experts_wide_sm90.h"

#include <algorithm>

#include "grouped_nvfp4_plan.h"
#include "grouped_sm90.h"
#include "order_cuda.h"

namespace n3::moe_experts::sm90 {

namespace {

namespace grouped = grouped_linear;
using grouped::sm90::To;

// Bytes of activations and rows of slots beyond which tokens go in blocks.
constexpr int64_t kWorkspace = int64_t(2) << 30;

grouped::Activation activation_of(Activation a) {
  switch (a) {
    case Activation::kRelu2: return grouped::Activation::kRelu2;
    case Activation::kSilu: return grouped::Activation::kSilu;
    default: return grouped::Activation::kGelu;
  }
}

int64_t hidden_width(const Params& p) { return p.dense ? p.inner : grouped::sm90::ordered(p.inner); }

// The activations of the slots, by expert, then the slots' rows. For NVFP4 weights both products' inputs are in order.
Tensor rows_of(const Params& p, const Tensor& x, const WideWeights& up, const WideWeights& down, const Sorted& sorted,
               cudaStream_t stream) {
  const int64_t slots = p.tokens * p.top_k;
  const auto* order = static_cast<const int32_t*>(sorted.order.const_data_ptr());
  const auto* offsets = static_cast<const int32_t*>(sorted.offsets.const_data_ptr());
  const Tensor tokens = p.dense ? aligned(x) : nvfp4::in_order(op, x, stream);
  const Tensor hidden = torch::stable::new_empty(x, {slots, hidden_width(p)}, ScalarType::BFloat16);
  const Tensor rows = torch::stable::new_empty(x, {slots, p.width}, ScalarType::Float);
  const auto multiply = [&](const grouped::sm90::Product& product, const WideWeights& w) {
    p.dense ? grouped::sm90::multiply(op, product, w.w, stream)
            : grouped::sm90::multiply(op, product, w.packed(), stream);
  };
  multiply({tokens, activation_of(p.activation), slots, offsets, order, int32_t(p.top_k), nullptr,
            p.dense ? To::kRows : To::kOrdered, nullptr, hidden.mutable_data_ptr()},
           up);
  multiply({hidden, grouped::Activation::kNone, slots, offsets, nullptr, 1, nullptr, To::kSlots, order,
            rows.mutable_data_ptr()},
           down);
  return rows;
}

}  // namespace

bool is_wide(const Params& p) { return p.tokens * p.top_k > kMostSlots * p.experts && !batch_invariant(); }

void run_wide(const Params& p, const Tensor& x, const WideWeights& up, const WideWeights& down, const Tensor& ids,
              const Tensor& weights, const OptionalTensor& valid_tokens, const Tensor& y, cudaStream_t stream) {
  const int64_t most = std::max<int64_t>(1, kWorkspace / (p.top_k * (2 * hidden_width(p) + 4 * p.width)));
  const Tensor gains = torch::stable::contiguous(weights);
  if (p.tokens <= most) {
    const Sorted sorted = sort_slots(p, ids, valid_tokens, stream);
    return combine(p, rows_of(p, x, up, down, sorted, stream), 1, gains, sorted.ids, y, stream);
  }
  const Tensor used = sort_slots(p, ids, valid_tokens, stream).ids;
  for (int64_t first = 0; first < p.tokens; first += most) {
    Params part = p;
    part.tokens = std::min(most, p.tokens - first);
    const auto of_part = [&](Tensor t) { return torch::stable::narrow(t, 0, first, part.tokens); };
    const Sorted sorted = sort_slots(part, of_part(used), {}, stream);
    const Tensor rows = rows_of(part, of_part(x), up, down, sorted, stream);
    combine(part, rows, 1, of_part(gains), sorted.ids, of_part(y), stream);
  }
}

}  // namespace n3::moe_experts::sm90
