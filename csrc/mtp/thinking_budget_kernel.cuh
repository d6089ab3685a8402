// thinking_budget: a warp per request, a lane per row. A row's look at its own output needs no other row; what began or
// ended at the rows before it is told by votes.
#pragma once
#include "../common/device.cuh"
#include "thinking_rules.h"

namespace n3::thinking_budget {

constexpr int kWarps = 4;  // of a block

//   grid  requests / kWarps, rounded up     block  32 * kWarps     `forced` holds -1s
__global__ __launch_bounds__(32 * kWarps) void budget_kernel(const Args a) {
  constexpr uint32_t kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (b >= a.requests) return;
  const Request request = request_of(a, b);
  const Output committed = output_of(a, request, b, 0);
  bool begun = request.spent(committed.n);
  for (int64_t k = lane; k < a.reach; k += 32) begun = begun || request.starts_at(committed, k);
  bool thinks = request.thinks, forces = __ballot_sync(kAll, begun) != 0;
  const uint32_t before = (1u << lane) - 1, through = before | 1u << lane;  // the lanes before this one; and this one
  for (int64_t base = 0; base < request.last - request.first; base += 32) {
    const int64_t i = base + lane, row = request.first + i;
    const uint32_t broken = __ballot_sync(kAll, row < request.last && a.drafts[row] < 0);  // the chain ends behind it
    const bool reached = row < request.last && !(broken & before);
    Look look{};
    if (reached) look = request.look(output_of(a, request, b, i));
    const uint32_t starts = __ballot_sync(kAll, reached && look.starts);
    const bool forced = forces || (starts & through);
    const uint32_t ends = __ballot_sync(kAll, reached && (look.ended || (forced && look.wanted < 0)));
    if (reached && forced && thinks && !(ends & through)) a.forced[row] = look.wanted;
    if (broken) return;
    forces = forces || starts, thinks = thinks && !ends;
  }
}

}  // namespace n3::thinking_budget
