// n3::sample: one token per row.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/threads.h"
#include "row.h"

namespace {

namespace mtp = n3::mtp;
using mtp::OptionalTensor;
using n3::ScalarType;
using n3::Tensor;

constexpr const char* op = "sample";

std::tuple<Tensor, Tensor, Tensor> sample(
    const Tensor& logits, const Tensor& seed, const Tensor& pos, const OptionalTensor& slot,
    const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
    const OptionalTensor& min_p, const OptionalTensor& bitmask, const OptionalTensor& bitmask_row,
    const OptionalTensor& forced_token, const OptionalTensor& bias_ids, const OptionalTensor& bias_val,
    const OptionalTensor& bias_cu) {
  const mtp::SlotArgs slots{seed, slot, temperature, top_k, top_p, min_p};
  const mtp::EditArgs edits{bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu};
  mtp::check_sample(op, logits, pos, slots, edits);
  const int64_t n = logits.size(0);

  const mtp::Rows rows(logits, slots, edits);
  const mtp::Column<int64_t> positions(pos);
  const Tensor tokens = torch::stable::new_empty(logits, {n}, ScalarType::Int);
  const Tensor logprobs = torch::stable::new_empty(logits, {n}, ScalarType::Float);
  const Tensor flags = torch::stable::new_empty(logits, {n}, ScalarType::Int);
  auto* token = static_cast<int32_t*>(tokens.mutable_data_ptr());
  auto* logprob = static_cast<float*>(logprobs.mutable_data_ptr());
  auto* flag = static_cast<int32_t*>(flags.mutable_data_ptr());
  n3::for_items(n, n * rows.vocab, [&](auto take) {
    mtp::Row row(rows);
    for (int64_t r = take(); r < n; r = take()) {
      const int64_t s = rows.slot.at(r, int32_t(r));
      mtp::Emitted e{-1, 0.f, s >= rows.slots ? mtp::kOutOfRange : 0};
      if (s >= 0 && s < rows.slots) e = row.emit(r, s, positions[r]);
      token[r] = e.token, logprob[r] = e.logprob, flag[r] = e.flags;
    }
  });
  return {tokens, logprobs, flags};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }
