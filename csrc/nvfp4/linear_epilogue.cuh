// The end of every kernel of nvfp4_linear.
#pragma once
#include "../common/device.cuh"

namespace n3::nvfp4_linear {

// relu(v)^2; NaN stays.
N3_DEVICE float relu2(float v) {
  const float positive = v < 0.f ? 0.f : v;
  return positive * positive;
}

// What is done to a sum before it is stored.
template <typename T>
struct Epilogue {
  const T* bias;  // or null
  T* y;
  int64_t m, n;
  float rest;
  bool relu2;

  N3_DEVICE void operator()(int64_t row, int64_t col, float sum) const {
    if (row >= m || col >= n) return;
    float v = sum * rest;
    if (bias) v += device::widen(bias[col]);
    if (relu2) v = nvfp4_linear::relu2(v);
    y[row * n + col] = device::narrow<T>(v);
  }
};

}  // namespace n3::nvfp4_linear
