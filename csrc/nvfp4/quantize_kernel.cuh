// nvfp4_quantize: every operation one float32 rounding, in the order of quantize.h. The library is compiled without
// fused multiply-adds and with true divisions; both are needed for the same bytes as every other backend.
#pragma once
#include "../common/device.cuh"
#include "quantize_plan.h"

namespace n3::nvfp4_quantize {

constexpr uint32_t kInfinity = 0x7f800000;

// partial[b] = largest finite |x|, as bits, over the 16-element groups b * kThreads + thread, gridDim.x * kThreads on.
//   grid  plan().partials     block kThreads     smem  one word per warp
// Magnitudes are compared as integers: they are ordered like the floats.
template <typename T>
__global__ __launch_bounds__(kThreads) void amax_kernel(const T* __restrict__ x, uint32_t* __restrict__ partial,
                                                        int64_t groups) {
  uint32_t top = 0;
  for (int64_t g = int64_t(blockIdx.x) * kThreads + threadIdx.x; g < groups; g += int64_t(gridDim.x) * kThreads) {
    float v[16];
    device::load16(x + g * 16, v);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t magnitude = float_bits(v[i]) & 0x7fffffff;
      top = max(top, magnitude < kInfinity ? magnitude : 0u);
    }
  }
  top = device::block_max<kThreads>(top);
  if (threadIdx.x == 0) partial[blockIdx.x] = top;
}

struct Codes {
  uint32_t word[2];  // codes 0..7 and 8..15, the low nibble first
};

N3_DEVICE Codes encode(const float (&x)[16], float scale, float inv) {
  const float factor = 1.f / (scale * inv);
  const float enc = factor < FLT_MAX ? factor : FLT_MAX;
  Codes codes{};
  if (scale == 0.f) return codes;  // nothing survives a scale of 0
#pragma unroll
  for (int i = 0; i < 16; ++i) codes.word[i / 8] |= uint32_t(e2m1_from_float(x[i] * enc)) << 4 * (i % 8);
  return codes;
}

// Sum over the block, k = 0..15 in order, of |(code * scale) * inv - x|.
N3_DEVICE float error_of(const float (&x)[16], const Codes& codes, float scale, float inv) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint8_t code = codes.word[i / 8] >> 4 * (i % 8) & 15;
    sum += fabsf(e2m1_to_float(code) * scale * inv - x[i]);
  }
  return sum;
}

// S_enc from the given decode scale, or from the maximum of the tensor.
N3_DEVICE float encode_scale(const float* given, uint32_t amax_bits, float normal) {
  const float from = given ? *given : bits_float(amax_bits);
  if (from == 0.f) return 1.f;
  const float s_enc = fminf((given ? 1.f : normal) / from, FLT_MAX);
  return s_enc == 0.f ? 1.f : s_enc;
}

// Codes, scales and the global scale.
//   grid  plan().blocks, one thread per place of the scale matrix, padding (which gets zero bytes) included
//   block kThreads     smem  one word per warp
// A thread owns one block of 16, so maxima and the ordered sums of four_over_six need no other thread.
template <typename T, bool kFourOverSix, bool kSwizzled>
__global__ __launch_bounds__(kThreads) void quantize_kernel(
    const T* __restrict__ x, const float* __restrict__ given, const uint32_t* __restrict__ partial, int partials,
    uint8_t* __restrict__ q, uint8_t* __restrict__ block_scale, float* __restrict__ global_out, int64_t rows,
    int64_t ks, int64_t places) {
  uint32_t top = 0;
  for (int i = threadIdx.x; i < partials; i += kThreads) top = max(top, partial[i]);
  top = device::block_max<kThreads>(top);
  const float s_enc = encode_scale(given, top, kFourOverSix ? 1536.f : 2688.f);
  const float inv = 1.f / s_enc;
  if (blockIdx.x == 0 && threadIdx.x == 0) *global_out = given ? *given : inv;

  // int64: the elements of x pass 2^31.
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= places) return;
  int64_t group = place, to = place;
  if constexpr (kSwizzled) {
    const int64_t cols = nvfp4_swizzle::padded_cols(ks), r = place / cols, c = place % cols;
    to = scale_128x4(r, c, ks);
    if (r >= rows || c >= ks) {
      block_scale[to] = 0;
      return;
    }
    group = r * ks + c;
  }

  float v[16];
  device::load16(x + group * 16, v);
  uint32_t magnitude = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) magnitude = max(magnitude, float_bits(v[i]) & 0x7fffffff);
  uint8_t byte = 0x7f;  // a NaN or an infinity: the block decodes to NaN
  Codes codes{};
  if (magnitude < kInfinity) {
    const float amax = bits_float(magnitude);
    if constexpr (kFourOverSix) {
      const float base = amax / 6.f * s_enc;
      byte = e4m3_from_float(base);
      codes = encode(v, e4m3_to_float(byte), inv);
      const uint8_t four = e4m3_from_float(base * 1.5f);
      const Codes other = encode(v, e4m3_to_float(four), inv);
      if (error_of(v, other, e4m3_to_float(four), inv) < error_of(v, codes, e4m3_to_float(byte), inv)) {
        byte = four;
        codes = other;
      }
    } else {
      byte = e4m3_from_float(amax * (s_enc / 6.f));
      codes = encode(v, e4m3_to_float(byte), inv);
    }
  }
  reinterpret_cast<uint2*>(q)[group] = make_uint2(codes.word[0], codes.word[1]);
  block_scale[to] = byte;
}

}  // namespace n3::nvfp4_quantize
