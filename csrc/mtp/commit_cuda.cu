#include "commit.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "commit_kernel.cuh"

namespace n3::mtp_commit {
namespace {

void mtp_commit(const Call& call) {
  const DeviceGuard guard(call.like.get_device_index());
  commit_kernel<<<1, kThreads, 0, current_stream(op, call.like)>>>(call.args);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

}  // namespace
}  // namespace n3::mtp_commit

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("mtp_commit", TORCH_BOX(&n3::mtp_commit::entry<n3::mtp_commit::mtp_commit>));
}
