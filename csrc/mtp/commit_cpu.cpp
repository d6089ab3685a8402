#include "commit.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>

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
  const commit::Call call(tokens, num_emitted, cu_rows, seq_len, slot, eos_ids, max_len, finished, histogram, ring_pos,
                          ring_size, ring_tokens);
  const commit::Args& a = call.args;
  int32_t before = 0;
  for (int64_t b = 0; b < a.requests; ++b) {
    const int32_t n = commit::emitted(a, b);
    commit::commit(a, b, n, before, [](int64_t* bin) { ++*bin; });
    before += n;
  }
  a.cu_emitted[a.requests] = before;
  std::fill(a.flat + before, a.flat + a.requests * a.width, -1);
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mtp_commit", TORCH_BOX(&mtp_commit)); }
