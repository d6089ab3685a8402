#include "thinking_budget.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "thinking_budget_kernel.cuh"

namespace n3::thinking_budget {
namespace {

void thinking_budget(const Call& call) {
  const DeviceGuard guard(call.like.get_device_index());
  const Args& a = call.args;
  const cudaStream_t stream = current_stream(op, call.like);
  if (a.rows > 0) {  // the bytes of -1
    N3_CUDA_CHECK(op, cudaMemsetAsync(a.forced, 0xff, a.rows * sizeof(int32_t), stream));
  }
  if (a.rows > 0 && a.requests > 0) {
    const auto blocks = uint32_t((a.requests + kWarps - 1) / kWarps);
    budget_kernel<<<blocks, 32 * kWarps, 0, stream>>>(a);
  }
  N3_CUDA_CHECK(op, cudaGetLastError());
}

}  // namespace
}  // namespace n3::thinking_budget

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("thinking_budget", TORCH_BOX(&n3::thinking_budget::entry<n3::thinking_budget::thinking_budget>));
}
