// n3::mtp_verify_tree: the records of every row, then a walk through each request's tree.
#include "verify_tree.h"

#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "rows_cuda.h"
#include "tree_kernel.cuh"

namespace n3::mtp {
namespace {

using verify_tree::op;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mtp_verify_tree(
    const Tensor& logits, const Tensor& node_tokens, const Tensor& parents, const Tensor& cu_rows, const Tensor& seed,
    const Tensor& pos, const std::string& mode_name, int64_t max_depth, const OptionalTensor& slot,
    const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
    const OptionalTensor& min_p, const OptionalTensor& bitmask, const OptionalTensor& bitmask_row,
    const OptionalTensor& forced_token, const OptionalTensor& bias_ids, const OptionalTensor& bias_val,
    const OptionalTensor& bias_cu, const OptionalTensor& eos_ids, const OptionalTensor& draft_ids,
    const OptionalTensor& draft_probs, const OptionalTensor& draft_vocab, const OptionalTensor& uniforms) {
  const SlotArgs slots{seed, slot, temperature, top_k, top_p, min_p};
  const EditArgs edits{bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu};
  const OptionalTensor none;
  const TreeMode mode = verify_tree::check(logits, node_tokens, parents, cu_rows, pos, mode_name, max_depth, slots,
                                           edits, eos_ids, {draft_ids, draft_probs, none, none, draft_vocab, uniforms});
  const DeviceGuard guard(logits.get_device_index());
  const int64_t b = cu_rows.size(0) - 1, n = logits.size(0), width = max_depth + 1;
  const Tensor tokens = torch::stable::new_empty(logits, {b, width}, ScalarType::Int);
  const Tensor num_emitted = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const Tensor path = torch::stable::new_empty(logits, {b, width}, ScalarType::Int);
  const Tensor logprobs = torch::stable::new_empty(logits, {b, width}, ScalarType::Float);
  const Tensor flags = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  if (b == 0) return {tokens, num_emitted, path, logprobs, flags};

  Operands operands;
  RowArgs a = operands.rows(logits, slots, edits, 0);
  a.cu_rows = operands.data<int32_t>(cu_rows), a.requests = int32_t(b);
  operands.add_records(op, a, logits, n, mode != TreeMode::kGreedy, false);
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const TreeArgs c{mode,
                   int32_t(max_depth),
                   operands.data<int64_t>(seed),
                   operands.data<int64_t>(pos),
                   operands.data<double>(uniforms),
                   operands.data<int32_t>(node_tokens),
                   operands.data<int32_t>(parents),
                   operands.data<int32_t>(eos_ids),
                   eos_ids ? int32_t(eos_ids->size(0)) : 0,
                   operands.data<int32_t>(draft_ids),
                   operands.data<int32_t>(draft_vocab),
                   operands.data<float>(draft_probs),
                   draft_ids ? int32_t(draft_ids->size(1)) : 0,
                   draft_vocab ? int32_t(draft_vocab->size(0)) : 0,
                   ints(tokens), ints(num_emitted), ints(path), ints(flags),
                   static_cast<float*>(logprobs.mutable_data_ptr())};
  const cudaStream_t stream = current_stream(op, logits);
  launch_records(op, a, logits.scalar_type(), n, stream);
  with_type(logits.scalar_type(), [&]<typename T>() {
    const auto kernel = mode == TreeMode::kToken ? tree_kernel<T, true> : tree_kernel<T, false>;
    launch_after(op, kernel, b, kDrawThreads, stage_bytes(a, kDrawWarps), stream, a, c);
  });
  return {tokens, num_emitted, path, logprobs, flags};
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("mtp_verify_tree", TORCH_BOX(&n3::mtp::mtp_verify_tree)); }
