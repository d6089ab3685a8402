// y[i] = row ids[i] of an NVFP4 matrix.
#pragma once
#include "decode_kernel.cuh"

namespace n3::nvfp4_embedding {

constexpr int kThreads = 256;

//   grid  one block per kThreads scale blocks of y     block kThreads     smem  none
// An id outside [0, n) gives a row of NaN: the host must not wait for the values, and a kernel cannot raise.
template <typename Id, typename T>
__global__ __launch_bounds__(kThreads) void embedding_kernel(const Id* __restrict__ ids, const uint8_t* __restrict__ q,
                                                             const uint8_t* __restrict__ block_scale,
                                                             const float* __restrict__ global_scale, T* __restrict__ y,
                                                             int64_t groups, int64_t n, int64_t ks) {
  const int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  const int64_t id = ids[group / ks];
  const bool good = id >= 0 && id < n;
  const int64_t from = good ? id * ks + group % ks : 0;
  const uint2 codes = good ? reinterpret_cast<const uint2*>(q)[from] : make_uint2(0, 0);
  float v[16];
  nvfp4::decode_block(codes, e4m3_to_float(good ? block_scale[from] : uint8_t(0x7f)), *global_scale, v);
  device::store16(y + group * 16, v);
}

}  // namespace n3::nvfp4_embedding
