// n3::mtp_draft_sample: the maxima of every row, then its most probable tokens.
#include "draft_sample.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "draft_sample_kernel.cuh"
#include "rows_cuda.h"

namespace n3::mtp {
namespace {

using draft_sample::op;

std::tuple<Tensor, Tensor, Tensor> mtp_draft_sample(const Tensor& logits, const Tensor& seed, const Tensor& pos,
                                                    int64_t max_ids, const OptionalTensor& slot,
                                                    const OptionalTensor& temperature,
                                                    const OptionalTensor& draft_vocab) {
  const OptionalTensor none;
  const SlotArgs slots{seed, slot, temperature, none, none, none};
  draft_sample::check(logits, pos, max_ids, slots, draft_vocab);
  const DeviceGuard guard(logits.get_device_index());
  const int64_t n = logits.size(0);
  const Tensor tokens = torch::stable::new_empty(logits, {n}, ScalarType::Int);
  const Tensor ids = torch::stable::new_empty(logits, {n, max_ids}, ScalarType::Int);
  const Tensor probs = torch::stable::new_empty(logits, {n, max_ids}, ScalarType::Float);
  if (n == 0) return {tokens, ids, probs};
  Operands operands;
  RowArgs a = operands.rows(logits, slots, {none, none, none, none, none, none}, 1);
  operands.add_records(op, a, logits, n, false, false);
  const DraftSampleArgs out{operands.data<int64_t>(seed), operands.data<int64_t>(pos),
                            operands.data<int32_t>(draft_vocab), static_cast<int32_t*>(tokens.mutable_data_ptr()),
                            static_cast<int32_t*>(ids.mutable_data_ptr()),
                            static_cast<float*>(probs.mutable_data_ptr()), int32_t(max_ids)};
  const cudaStream_t stream = current_stream(op, logits);
  launch_records(op, a, logits.scalar_type(), n, stream);
  with_type(logits.scalar_type(), [&]<typename T>() {
    launch_after(op, draft_sample_kernel<T>, n, kCutThreads, 0, stream, a, out);
  });
  return {tokens, ids, probs};
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("mtp_draft_sample", TORCH_BOX(&n3::mtp::mtp_draft_sample)); }
