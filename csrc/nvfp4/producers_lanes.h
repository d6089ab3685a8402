// The producers' arithmetic, compiled once per instruction set by a file that defines N3_LANES.
#pragma once
#include <algorithm>

#include "../common/lanes64.h"
#include "producers_kernels.h"

namespace n3::nvfp4_producers {
namespace {

template <typename T>
void relu2(const void* x_data, void* y_data, int64_t n) {
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = load(x + i), positive = v < 0.f ? F32{} : v;  // keeps NaN
    store(y + i, positive * positive);
  }
}

template <typename T>
void silu_mul(const void* x, void* y_data, int64_t n) {
  const T *a = static_cast<const T*>(x), *b = a + n;
  T* y = static_cast<T*>(y_data);
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, silu(load(a + i)) * load(b + i));
}

template <typename T, typename R>
void add(const void* x_data, const void* residual, void* sum_data, int64_t n) {
  const T* x = static_cast<const T*>(x_data);
  const R* r = static_cast<const R*>(residual);
  R* sum = static_cast<R*>(sum_data);
  for (int64_t i = 0; i < n; i += kLanes) store(sum + i, load(x + i) + load(r + i));
}

template <size_t... I>
N3_LANE_FN F64 wide_half(F32 v, int half, std::index_sequence<I...>) {
  const HalfF32 low = __builtin_shufflevector(v, v, I...), high = __builtin_shufflevector(v, v, (kLanes64 + I)...);
  return __builtin_convertvector(half ? high : low, F64);
}

// Element i is in sum i % 16 whatever the vectors' length; a square is exact.
template <typename T>
double sum_of_squares(const void* data, int64_t n) {
  constexpr int kSums = 16, kVectors = kSums / kLanes64;
  const T* h = static_cast<const T*>(data);
  F64 sums[kVectors] = {};
  for (int64_t i = 0; i < n; i += kSums) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const F64 w = wide_half(load(h + i + v / 2 * kLanes), v % 2, std::make_index_sequence<kLanes64>());
      sums[v] += w * w;
    }
  }
  double sum[kSums];
  std::memcpy(sum, sums, sizeof sum);
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

template <typename T, typename H>
void scale(const void* h_data, float rstd, const float* weight, void* y_data, int64_t n) {
  const H* h = static_cast<const H*>(h_data);
  T* y = static_cast<T*>(y_data);
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(h + i) * rstd * load(weight + i));
}

constexpr Kernels kKernels = {
    {relu2<float>, relu2<Half>, relu2<BFloat16>},
    {silu_mul<float>, silu_mul<Half>, silu_mul<BFloat16>},
    {{add<float, float>, add<float, float>}, {add<Half, Half>, add<Half, float>},
     {add<BFloat16, BFloat16>, add<BFloat16, float>}},
    {sum_of_squares<float>, sum_of_squares<Half>, sum_of_squares<BFloat16>},
    {{scale<float, float>, scale<float, float>}, {scale<Half, Half>, scale<Half, float>},
     {scale<BFloat16, BFloat16>, scale<BFloat16, float>}},
};

}  // namespace
}  // namespace n3::nvfp4_producers
