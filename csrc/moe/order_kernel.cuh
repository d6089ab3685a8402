// Rows of x in the order of k in which NVFP4 weights meet them on sm_90a, for kernels that copy rows as they are.
#pragma once
#include "../common/device.cuh"
#include "experts_nvfp4_plan.h"

namespace n3::moe_experts::sm90::nvfp4 {

// x [rows, k] of 16 bits in the order of position_of, [rows, 128 units], with zeros behind k.
//   grid  all words of all units, kOrderThreads to a block     a thread  8 k of each of a unit's four threads
constexpr int kOrderThreads = 256;

static __global__ __launch_bounds__(kOrderThreads) void order_kernel(const uint16_t* x, uint16_t* to, int64_t rows,
                                                                     int32_t k, int32_t units) {
  const int64_t i = int64_t(blockIdx.x) * kOrderThreads + threadIdx.x;
  if (i >= rows * units * 4) return;
  const int word = int(i % 4), unit = int(i / 4 % units);
  const int64_t row = i / 4 / units;
  uint4 v[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int32_t from = unit * kUnit + 32 * t + 8 * word;
    v[t] = from < k ? *reinterpret_cast<const uint4*>(x + row * k + from) : make_uint4(0, 0, 0, 0);
  }
  auto* place = reinterpret_cast<uint4*>(to + (row * units + unit) * kUnit + 32 * word);
#pragma unroll
  for (int s = 0; s < 2; ++s) {  // elements 2 s and 2 s + 4 of each; then 2 s + 1 and 2 s + 5
    uint32_t even[4], odd[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const uint32_t low = s ? v[t].y : v[t].x, high = s ? v[t].w : v[t].z;
      even[t] = (low & 0xffff) | high << 16, odd[t] = low >> 16 | (high & 0xffff0000);
    }
    place[2 * s] = make_uint4(even[0], even[1], even[2], even[3]);
    place[2 * s + 1] = make_uint4(odd[0], odd[1], odd[2], odd[3]);
  }
}

}  // namespace n3::moe_experts::sm90::nvfp4
