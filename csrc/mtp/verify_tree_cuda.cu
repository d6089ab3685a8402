// n3::mtp_verify_tree: the records of every row, then a walk through each request's tree.
#include "verify_tree.h"

#include <torch/csrc/stable/library.h>

#include "rows_cuda.h"
#include "tree_kernel.cuh"

namespace n3::mtp {
namespace {

void mtp_verify_tree(const verify_tree::Call& call) {
  using verify_tree::op;
  const TreeArgs& c = call.args;
  if (c.requests == 0) return;
  const DeviceGuard guard(call.like.get_device_index());
  RowArgs a = rows_of(call.rows, 0);
  a.cu_rows = c.cu_rows, a.requests = c.requests;
  const Tensor records = add_records(op, a, call.like, a.rows, c.mode != TreeMode::kGreedy, false);
  const cudaStream_t stream = current_stream(op, call.like);
  launch_records(op, a, a.rows, stream);
  with_type(a.type, [&]<typename T>() {
    const auto kernel = c.mode == TreeMode::kToken ? tree_kernel<T, true> : tree_kernel<T, false>;
    launch_after(op, kernel, c.requests, kDrawThreads, stage_bytes(a, kDrawWarps), stream, a, c);
  });
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("mtp_verify_tree", TORCH_BOX(&n3::mtp::verify_tree::entry<n3::mtp::mtp_verify_tree>));
}
