// n3::mtp_draft_sample: the maxima of every row, then its most probable tokens.
#include "draft_sample.h"

#include <torch/csrc/stable/library.h>

#include "draft_sample_kernel.cuh"
#include "rows_cuda.h"

namespace n3::mtp {
namespace {

void mtp_draft_sample(const draft_sample::Call& call) {
  using draft_sample::op;
  const DeviceGuard guard(call.like.get_device_index());
  const int64_t n = call.rows.rows;
  if (n == 0) return;
  RowArgs a = rows_of(call.rows, 1);
  const Tensor records = add_records(op, a, call.like, n, false, false);
  const cudaStream_t stream = current_stream(op, call.like);
  launch_records(op, a, n, stream);
  with_type(a.type, [&]<typename T>() {
    launch_after(op, draft_sample_kernel<T>, n, kCutThreads, 0, stream, a, call.args);
  });
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("mtp_draft_sample", TORCH_BOX(&n3::mtp::draft_sample::entry<n3::mtp::mtp_draft_sample>));
}
