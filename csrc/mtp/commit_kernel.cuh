// mtp_commit in one block, as the flat tokens are one list: a thread per request, whose place is a running sum.
#pragma once
#include "../common/scan.cuh"
#include "commit_request.h"

namespace n3::mtp_commit {

constexpr int kThreads = 256;

//   grid  1     block  kThreads
__global__ __launch_bounds__(kThreads) void commit_kernel(const Args a) {
  __shared__ int32_t of_warp[kThreads / 32];
  const auto add_one = [](int64_t* bin) {  // integers: in any order
    atomicAdd(reinterpret_cast<unsigned long long*>(bin), 1ull);
  };
  int32_t done = 0;  // tokens of the requests before
  for (int64_t first = 0; first < a.requests; first += kThreads) {
    const int64_t b = first + threadIdx.x;
    const bool inside = b < a.requests;
    const int32_t n = inside ? emitted(a, b) : 0;
    int32_t all;
    const int32_t before = device::block_before<kThreads>(n, of_warp, all);
    if (inside) commit(a, b, n, done + before, add_one);
    done += all;
  }
  if (threadIdx.x == 0) a.cu_emitted[a.requests] = done;
  for (int64_t i = int64_t(done) + threadIdx.x; i < a.requests * a.width; i += kThreads) a.flat[i] = -1;
}

}  // namespace n3::mtp_commit
