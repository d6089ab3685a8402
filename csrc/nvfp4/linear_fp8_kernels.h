// What linear_fp8_cpu.cpp asks of each instruction set beside the products of nvfp4_linear. All give the same bits. Plain
// data, no torch: *_avx512.cpp includes it too.
#pragma once
#include <cstdint>

namespace n3::nvfp4_linear::fp8 {

// Of the block scales of a row, as bytes without their sign; NaN does not count. 0 and 0x7f where there is none.
struct Extremes {
  uint8_t largest, least;  // least: of those that are not zero
};

struct Kernels {
  // x8 = e4m3(x / scale) of a row of k elements, as float32 or bfloat16 numbers; returns the scale. Indexed by the
  // Element of x. A row with a NaN or an infinity has zeros and the scale NaN.
  float (*quantize_to_float[3])(const void* x, int64_t k, void* x8);
  float (*quantize_to_bfloat16[3])(const void* x, int64_t k, void* x8);
  Extremes (*extremes)(const uint8_t* scale, int64_t n);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::nvfp4_linear::fp8
