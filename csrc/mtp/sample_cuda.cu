// n3::sample: the records of every row, then a draw from each.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "rows_cuda.h"
#include "sample_cuda.h"

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
  const n3::DeviceGuard guard(logits.get_device_index());
  const int64_t n = logits.size(0);
  const Tensor tokens = torch::stable::new_empty(logits, {n}, ScalarType::Int);
  const Tensor logprobs = torch::stable::new_empty(logits, {n}, ScalarType::Float);
  const Tensor flags = torch::stable::new_empty(logits, {n}, ScalarType::Int);
  mtp::Operands operands;
  mtp::RowArgs a = operands.rows(logits, slots, edits, 1);
  operands.add_records(op, a, logits, n, true, false);
  const mtp::SampleArgs out{operands.data<int64_t>(seed), operands.data<int64_t>(pos),
                            static_cast<int32_t*>(tokens.mutable_data_ptr()),
                            static_cast<int32_t*>(flags.mutable_data_ptr()),
                            static_cast<float*>(logprobs.mutable_data_ptr())};
  const cudaStream_t stream = n3::current_stream(op, logits);
  mtp::launch_records(op, a, logits.scalar_type(), n, stream);
  mtp::launch_sample(op, a, out, logits.scalar_type(), n, stream);
  return {tokens, logprobs, flags};
}

}  // namespace

namespace n3::mtp {

void launch_sample(const char* name, const RowArgs& a, const SampleArgs& out, ScalarType dtype, int64_t units,
                   cudaStream_t stream) {
  if (units == 0) return;
  with_type(dtype, [&]<typename T>() {
    launch_after(name, sample_kernel<T>, units, kDrawThreads, stage_bytes(a, kDrawWarps), stream, a, out);
  });
}

}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("sample", TORCH_BOX(&sample)); }
