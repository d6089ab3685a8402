// The plain sampler: the token of each unit, from the records and one tile.
#pragma once
#include "draw.cuh"

namespace n3::mtp {

//   grid  units     block  kDrawThreads     dynamic smem  a sub-tile of floats per warp where there are biases
template <typename T>
__global__ __launch_bounds__(kDrawThreads, 2) void sample_kernel(const RowArgs a, const SampleArgs out) {
  __shared__ DrawShared shared;
  hopper::wait_for_previous();
  hopper::let_next_start();
  const int32_t unit = int32_t(blockIdx.x);
  const Unit u = locate(a, unit);
  Emitted32 e{-1, 0.};
  uint32_t flags = u.slot >= a.slots ? kOutOfRange : 0;
  if (u.live) {
    Law<T> law(a, shared);
    law.open(u, unit);
    e = law.emit(a.seed[u.slot], out.pos[u.request] + u.i);
    flags = law.flags;
  }
  if (threadIdx.x != 0) return;
  out.tokens[unit] = e.token, out.logprobs[unit] = float(e.logprob), out.flags[unit] = int32_t(flags);
}

}  // namespace n3::mtp
