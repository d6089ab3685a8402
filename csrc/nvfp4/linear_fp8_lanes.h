// Rows of nvfp4_linear_fp8, compiled once per instruction set by a file that defines N3_LANES.
#pragma once
#include <algorithm>
#include <limits>

#include "../common/lanes.h"
#include "linear_fp8_kernels.h"

namespace n3::nvfp4_linear::fp8 {
namespace {

// The value of e4m3(v) to nearest even, saturating at 448.
N3_LANE_FN F32 rounded_to_e4m3(F32 v) {
  const U32 bits = (U32)v, magnitude = bits & 0x7fffffff;
  const U32 normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) & 0xfff00000;  // 3 bits behind the point
  const F32 a = (F32)magnitude, subnormal = a + 16384.f - 16384.f;                // 2^14 has a last place of 2^-9
  const F32 value = min(a < 0.015625f ? subnormal : (F32)normal, splat(448.f));
  return (F32)((U32)value | (bits & 0x80000000));
}

template <typename X, typename T>
float quantize_row(const void* x_data, int64_t k, void* x8_data) {
  const X* x = static_cast<const X*>(x_data);
  T* x8 = static_cast<T*>(x8_data);
  I32 top{};
  for (int64_t i = 0; i < k; i += kLanes) {
    const I32 magnitude = (I32)load(x + i) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = std::max<int32_t>(most, top[i]);
  if (most >= 0x7f800000) {
    std::memset(x8, 0, k * sizeof(T));
    return std::numeric_limits<float>::quiet_NaN();
  }
  float amax;
  std::memcpy(&amax, &most, 4);
  float scale = amax / 448.f;
  if (scale == 0.f) scale = 1.f;
  for (int64_t i = 0; i < k; i += kLanes) store(x8 + i, rounded_to_e4m3(load(x + i) / scale));
  return scale;
}

using Bytes = uint8_t __attribute__((vector_size(16)));

Extremes extremes(const uint8_t* scale, int64_t n) {
  Bytes largest{}, before_least = Bytes{} - 1;  // the byte before the least: that of 0 is the largest of all
  const auto add = [&](Bytes v) {
    v &= 0x7f;
    const Bytes number = v == 0x7f ? Bytes{} : v, before = v - 1;
    largest = number > largest ? number : largest;
    before_least = before < before_least ? before : before_least;
  };
  Bytes v;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    std::memcpy(&v, scale + i, 16);
    add(v);
  }
  if (i < n) {
    v = Bytes{};
    std::memcpy(&v, scale + i, n - i);
    add(v);
  }
  uint8_t most = 0, least = 0x7e;
  for (int j = 0; j < 16; ++j) {
    most = std::max<uint8_t>(most, largest[j]);
    least = std::min<uint8_t>(least, before_least[j]);
  }
  return {most, uint8_t(least + 1)};
}

constexpr Kernels kKernels = {
    {quantize_row<float, float>, quantize_row<Half, float>, quantize_row<BFloat16, float>},
    {quantize_row<float, BFloat16>, quantize_row<Half, BFloat16>, quantize_row<BFloat16, BFloat16>},
    extremes,
};

}  // namespace
}  // namespace n3::nvfp4_linear::fp8
