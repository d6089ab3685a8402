// y = (e2m1 * e4m3) * global_scale.
#pragma once
#include "decode_kernel.cuh"

namespace n3::nvfp4_dequantize {

constexpr int kThreads = 256;

//   grid  one block per kThreads scale blocks     block kThreads     smem  none
// One thread per scale block: 8 bytes in, 16 elements out.
template <typename T, bool kSwizzled>
__global__ __launch_bounds__(kThreads) void dequantize_kernel(const uint8_t* __restrict__ q,
                                                              const uint8_t* __restrict__ block_scale,
                                                              const float* __restrict__ global_scale,
                                                              T* __restrict__ y, int64_t groups, int64_t ks) {
  // int64: the elements of y pass 2^31.
  const int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  const int64_t at = kSwizzled ? scale_128x4(group / ks, group % ks, ks) : group;
  float v[16];
  nvfp4::decode_block(reinterpret_cast<const uint2*>(q)[group], e4m3_to_float(block_scale[at]), *global_scale, v);
  device::store16(y + group * 16, v);
}

}  // namespace n3::nvfp4_dequantize
