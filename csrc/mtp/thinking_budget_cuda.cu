#include "thinking_budget.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "thinking_budget_kernel.cuh"

namespace {

namespace thinking = n3::thinking_budget;
using n3::Tensor;

Tensor thinking_budget(const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& committed_tail,
                       const Tensor& num_output, const Tensor& active, const Tensor& budget, const Tensor& grace,
                       const Tensor& end_ids, const Tensor& end_think_ids, const Tensor& newline_bitmask) {
  thinking::check(draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids, end_think_ids,
                  newline_bitmask);
  const n3::DeviceGuard guard(draft_tokens.get_device_index());
  const thinking::Call call(draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids,
                            end_think_ids, newline_bitmask);
  const thinking::Args& a = call.args;
  const cudaStream_t stream = n3::current_stream(thinking::op, draft_tokens);
  if (a.rows > 0) {  // the bytes of -1
    N3_CUDA_CHECK(thinking::op, cudaMemsetAsync(a.forced, 0xff, a.rows * sizeof(int32_t), stream));
  }
  if (a.rows > 0 && a.requests > 0) {
    const auto blocks = uint32_t((a.requests + thinking::kWarps - 1) / thinking::kWarps);
    thinking::budget_kernel<<<blocks, 32 * thinking::kWarps, 0, stream>>>(a);
  }
  N3_CUDA_CHECK(thinking::op, cudaGetLastError());
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("thinking_budget", TORCH_BOX(&thinking_budget)); }
