// Running sums over the threads of a block.
#pragma once
#include "device.cuh"

namespace n3::device {

// The sum over the threads before this one, in each of kThreads; `sum` becomes that of all. With barriers. `of_warp`: a
// word of shared memory per warp.
template <int kThreads>
N3_DEVICE int32_t block_before(int32_t v, int32_t* of_warp, int32_t& sum) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t through = v;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, through, by);
    if (lane >= by) through += other;
  }
  __syncthreads();  // of_warp was read
  if (lane == 31) of_warp[warp] = through;
  __syncthreads();
  int32_t before = through - v;
  sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += of_warp[w];
    sum += of_warp[w];
  }
  return before;
}

}  // namespace n3::device
