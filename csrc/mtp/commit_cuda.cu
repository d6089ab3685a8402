#include "commit.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "commit_kernel.cuh"

namespace {

namespace commit = n3::mtp_commit;
using n3::Tensor;
using n3::mtp::OptionalTensor;

commit::Outputs mtp_commit(const Tensor& tokens, const Tensor& num_emitted, const Tensor& cu_rows,
                           const Tensor& seq_len, const OptionalTensor& slot, const OptionalTensor& eos_ids,
                           const OptionalTensor& max_len, const OptionalTensor& finished,
                           const OptionalTensor& histogram, const OptionalTensor& ring_pos, int64_t ring_size,
                           int64_t ring_tokens) {
  commit::check(tokens, num_emitted, cu_rows, seq_len, slot, eos_ids, max_len, finished, histogram, ring_pos, ring_size,
                ring_tokens);
  const n3::DeviceGuard guard(tokens.get_device_index());
  const commit::Call call(tokens, num_emitted, cu_rows, seq_len, slot, eos_ids, max_len, finished, histogram, ring_pos,
                          ring_size, ring_tokens);
  commit::commit_kernel<<<1, commit::kThreads, 0, n3::current_stream(commit::op, tokens)>>>(call.args);
  N3_CUDA_CHECK(commit::op, cudaGetLastError());
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("mtp_commit", TORCH_BOX(&mtp_commit)); }
