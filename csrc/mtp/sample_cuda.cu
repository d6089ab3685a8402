// n3::sample: the records of every row, then a draw from each.
#include "sample_cuda.h"

#include <torch/csrc/stable/library.h>

#include "sample.h"
#include "sample_kernel.cuh"

namespace n3::mtp {

void launch_sample(const char* op, const RowArgs& a, const SampleArgs& out, int64_t units, cudaStream_t stream) {
  if (units == 0) return;
  with_type(a.type, [&]<typename T>() {
    launch_after(op, sample_kernel<T>, units, kDrawThreads, stage_bytes(a, kDrawWarps), stream, a, out);
  });
}

namespace {

void sample(const sampling::Call& call) {
  using sampling::op;
  const DeviceGuard guard(call.like.get_device_index());
  const int64_t n = call.rows.rows;
  RowArgs a = rows_of(call.rows, 1);
  const Tensor records = add_records(op, a, call.like, n, true, false);
  const cudaStream_t stream = current_stream(op, call.like);
  launch_records(op, a, n, stream);
  launch_sample(op, a, call.args, n, stream);
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("sample", TORCH_BOX(&n3::mtp::sampling::entry<n3::mtp::sample>)); }
