// What producers_cpu.cpp asks of each instruction set: rows of n elements, a multiple of 16, side by side. All give the
// same bits. Plain data, no torch: *_avx512.cpp includes it too.
#pragma once
#include <cstdint>

namespace n3::nvfp4_producers {

// Indexed by Element: the dtype of x and y. h is what a norm is of: x, or the sum in the dtype of the residual, which
// is float32 in the second column.
struct Kernels {
  void (*relu2[3])(const void* x, void* y, int64_t n);
  void (*silu_mul[3])(const void* x, void* y, int64_t n);  // x: n gates, then n factors
  // sum = x + residual, rounded to the dtype of both.
  void (*add[3][2])(const void* x, const void* residual, void* sum, int64_t n);
  double (*sum_of_squares[3])(const void* h, int64_t n);
  // y = (h * rstd) * weight
  void (*scale[3][2])(const void* h, float rstd, const float* weight, void* y, int64_t n);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::nvfp4_producers
