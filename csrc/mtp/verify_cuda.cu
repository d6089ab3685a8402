// n3::mtp_verify: the records of every row that may be looked at, then a walk through each request's chain.
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "compare_kernel.cuh"
#include "sample_cuda.h"
#include "verify.h"
#include "verify_kernel.cuh"

namespace n3::mtp {
namespace {

using verify::op;

template <typename T>
T* results(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

DenseType dense_type_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? kDenseFloat : dtype == ScalarType::Half ? kDenseHalf : kDenseBFloat16;
}

// Modes greedy and coupled: what `sample` draws in every row, compared with the drafts.
void by_target(const RowArgs& a, const VerifyArgs& c, const Tensor& logits, int64_t requests, cudaStream_t stream) {
  const int64_t units = requests * a.width;
  const Tensor own = torch::stable::new_empty(logits, {3, units}, ScalarType::Int);
  int32_t* first = results<int32_t>(own);
  const SampleArgs draws{c.seed, c.pos, first, first + units, reinterpret_cast<float*>(first + 2 * units)};
  launch_sample(op, a, draws, logits.scalar_type(), units, stream);
  launch_after(op, compare_kernel, (requests + kDrawWarps - 1) / kDrawWarps, kDrawThreads, 0, stream, a, c, draws,
               int32_t(requests));
}

void by_laws(const RowArgs& a, const RowArgs& drafts, const VerifyArgs& c, ScalarType dtype, int64_t requests,
             cudaStream_t stream) {
  with_type(dtype, [&]<typename T>() {
    const auto kernel = c.mode <= VerifyMode::kBlock ? verify_kernel<T, false> : verify_kernel<T, true>;
    launch_after(op, kernel, requests, kDrawThreads, stage_bytes(a, kDrawWarps), stream, a, drafts, c);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mtp_verify(
    const Tensor& logits, const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& seed, const Tensor& pos,
    const std::string& mode_name, int64_t max_drafts, const OptionalTensor& slot, const OptionalTensor& temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p,
    const OptionalTensor& bitmask, const OptionalTensor& bitmask_row, const OptionalTensor& forced_token,
    const OptionalTensor& bias_ids, const OptionalTensor& bias_val, const OptionalTensor& bias_cu,
    const OptionalTensor& eos_ids, const OptionalTensor& draft_ids, const OptionalTensor& draft_probs,
    const OptionalTensor& draft_logits, const OptionalTensor& draft_temperature, const OptionalTensor& draft_vocab,
    bool allow_lossy, int64_t relaxed_top_k, double relaxed_delta, double typical_epsilon, double typical_delta,
    const OptionalTensor& uniforms) {
  const SlotArgs slots{seed, slot, temperature, top_k, top_p, min_p};
  const EditArgs edits{bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu};
  const VerifyMode mode = verify::check(
      logits, draft_tokens, cu_rows, pos, mode_name, max_drafts, slots, edits, eos_ids,
      {draft_ids, draft_probs, draft_logits, draft_temperature, draft_vocab, uniforms},
      {allow_lossy, relaxed_top_k, relaxed_delta, typical_epsilon, typical_delta});
  const DeviceGuard guard(logits.get_device_index());
  const int64_t b = cu_rows.size(0) - 1, width = max_drafts + 1;
  const Tensor tokens = torch::stable::new_empty(logits, {b, width}, ScalarType::Int);
  const Tensor num_emitted = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const Tensor last_row = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const Tensor logprobs = torch::stable::new_empty(logits, {b, width}, ScalarType::Float);
  const Tensor flags = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  if (b == 0) return {tokens, num_emitted, last_row, logprobs, flags};

  Operands operands;
  const auto chains = [&](RowArgs& a) {
    a.cu_rows = operands.data<int32_t>(cu_rows), a.drafts = operands.data<int32_t>(draft_tokens);
  };
  RowArgs a = operands.rows(logits, slots, edits, width), drafts{};
  chains(a);
  if (mode >= VerifyMode::kToken) {  // the draft is certain where there is no list
    a.law_tokens = a.drafts, a.law_ids = operands.data<int32_t>(draft_ids);
    a.entries = draft_ids ? int32_t(draft_ids->size(1)) : 1;
    a.law_map = operands.data<int32_t>(draft_vocab), a.mapped = draft_vocab ? int32_t(draft_vocab->size(0)) : 0;
    a.apart = mode <= VerifyMode::kBlock && !draft_logits;
  }
  operands.add_records(op, a, logits, b * width, mode != VerifyMode::kGreedy, mode == VerifyMode::kTypical);
  const cudaStream_t stream = current_stream(op, logits);
  launch_records(op, a, logits.scalar_type(), b * width, stream);
  const VerifyArgs c{
      mode, draft_logits ? dense_type_of(draft_logits->scalar_type()) : 0, operands.data<int64_t>(seed),
      operands.data<int64_t>(pos), operands.data<double>(uniforms), a.drafts, operands.data<int32_t>(eos_ids),
      eos_ids ? int32_t(eos_ids->size(0)) : 0, operands.data<float>(draft_probs), relaxed_top_k, relaxed_delta,
      typical_epsilon, typical_delta, results<int32_t>(tokens), results<int32_t>(num_emitted),
      results<int32_t>(last_row), results<int32_t>(flags), results<float>(logprobs)};
  if (mode <= VerifyMode::kCoupled) {
    by_target(a, c, logits, b, stream);
    return {tokens, num_emitted, last_row, logprobs, flags};
  }
  if (draft_logits) {
    const OptionalTensor none;
    const Tensor columns = draft_logits->stride(1) == 1 ? *draft_logits : torch::stable::contiguous(*draft_logits);
    drafts = operands.rows(columns, {seed, slot, draft_temperature, none, none, none},
                           {none, none, none, none, none, none}, width);
    chains(drafts);
    drafts.certain_at_infinity = true;
    operands.add_records(op, drafts, logits, b * width, true, false);
    launch_records(op, drafts, columns.scalar_type(), b * width, stream);
  }
  by_laws(a, drafts, c, logits.scalar_type(), b, stream);
  return {tokens, num_emitted, last_row, logprobs, flags};
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("mtp_verify", TORCH_BOX(&n3::mtp::mtp_verify)); }
