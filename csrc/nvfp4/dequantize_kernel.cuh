// y = (e2m1 * e4m3) * global_scale.
#pragma once
#include "decode_kernel.cuh"

namespace n3::nvfp4_dequantize {

constexpr int kThreads = 256;

// Of numbers that mostly fit in 32 bits, where a quotient takes a quarter of the time.
N3_DEVICE int64_t quotient(int64_t n, int64_t d) {
  return (n | d) >> 32 ? n / d : int64_t(uint32_t(n) / uint32_t(d));
}

//   grid  one block per kThreads scale blocks     block kThreads     smem  none
// One thread per scale block: 8 bytes in, 16 elements out. The global scale changes every `per_global` blocks.
template <typename T, bool kSwizzled>
__global__ __launch_bounds__(kThreads) void dequantize_kernel(const uint8_t* __restrict__ q,
                                                              const uint8_t* __restrict__ block_scale,
                                                              const float* __restrict__ global_scale,
                                                              T* __restrict__ y, int64_t groups, int64_t ks,
                                                              int64_t per_global) {
  // int64: the elements of y pass 2^31.
  const int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  int64_t at = group;
  if constexpr (kSwizzled) {
    const int64_t row = quotient(group, ks);
    at = scale_128x4(row, group - row * ks, ks);
  }
  const float global = global_scale[per_global < groups ? quotient(group, per_global) : 0];
  float v[16];
  nvfp4::decode_block(reinterpret_cast<const uint2*>(q)[group], e4m3_to_float(block_scale[at]), global, v);
  device::store16(y + group * 16, v);
}

}  // namespace n3::nvfp4_dequantize
