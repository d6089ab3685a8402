// Modes greedy and coupled: the target's own tokens, up to the first that is not the draft.
#pragma once
#include "chain.cuh"
#include "sample_kernel.cuh"

namespace n3::mtp {

//   grid  requests / 4     block  kDrawThreads: a warp per request
// `own`: what sample_kernel has left of every unit.
__global__ __launch_bounds__(kDrawThreads) void compare_kernel(const RowArgs a, const VerifyArgs c,
                                                               const SampleArgs own) {
  hopper::wait_for_previous();
  const int32_t b = int32_t(blockIdx.x) * kDrawWarps + warp_id();
  if (b >= c.requests) return;
  const Unit u = locate(a, b * a.width);
  const int64_t at = int64_t(b) * a.width;
  uint32_t flags = 0;
  int32_t count = 0;
  const int32_t most = u.rows - 1 < a.width - 1 ? u.rows - 1 : a.width - 1;
  for (int32_t start = 0; u.live && start <= most; start += 32) {
    const int32_t i = start + lane_id();
    const int32_t token = i <= most ? own.tokens[at + i] : -1, draft = i < most ? c.drafts[u.first + i] : -1;
    const int stop = __ffs(__ballot_sync(kAll, i >= most || draft != token || is_eos(c, token)));
    const bool emits = !stop || lane_id() < stop;
    if (emits) {
      c.tokens[at + i] = token, c.logprobs[at + i] = own.logprobs[at + i];
      flags |= own.flags[at + i] | (i < most && draft >= a.vocab ? kOutOfRange : 0);
    }
    count = start + (stop ? stop : 32);
    if (stop) break;
  }
  finish(a, c, u, count, any_bits(flags), lane_id(), 32);
}

}  // namespace n3::mtp
