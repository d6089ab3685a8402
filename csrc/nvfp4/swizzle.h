// nvfp4_swizzle_scale, nvfp4_unswizzle_scale: block scales between row-major [R, Ks] and the 128x4 tiles that
// block-scaled tensor core instructions read (byte order: scale_128x4 in numerics.h), R and Ks padded with zero bytes
// to multiples of 128 and 4. A leading dimension is a batch of matrices.
#pragma once
#include "../common/check.h"
#include "swizzle_plan.h"

namespace n3::nvfp4_swizzle {

struct Params {
  const uint8_t* in;
  uint8_t* out;
  int64_t batch, rows, cols;  // of the matrices before padding
};

inline void check_scale(const char* op, const Tensor& block_scale) {
  check_dtype(op, "block_scale", block_scale, ScalarType::Float8_e4m3fn);
  N3_CHECK(op, block_scale.dim() == 2 || block_scale.dim() == 3, "block_scale must have 2 or 3 dimensions, got ",
           block_scale.dim());
}

// Both check one call, for CPU and CUDA alike, and return the problem with null pointers.
inline Params check_swizzle(const Tensor& block_scale) {
  check_scale("nvfp4_swizzle_scale", block_scale);
  const int64_t batch = block_scale.dim() == 3 ? block_scale.size(0) : 1;
  return {nullptr, nullptr, batch, block_scale.size(-2), block_scale.size(-1)};
}

inline Params check_unswizzle(const Tensor& block_scale, int64_t rows, int64_t cols) {
  const char* op = "nvfp4_unswizzle_scale";
  check_scale(op, block_scale);
  N3_CHECK(op, rows >= 0, "rows must be at least 0, got ", rows);
  N3_CHECK(op, cols >= 0, "cols must be at least 0, got ", cols);
  if (block_scale.dim() == 2) {
    check_shape(op, "block_scale", block_scale, {padded_rows(rows), padded_cols(cols)});
    return {nullptr, nullptr, 1, rows, cols};
  }
  const int64_t batch = block_scale.size(0);
  check_shape(op, "block_scale", block_scale, {batch, padded_rows(rows), padded_cols(cols)});
  return {nullptr, nullptr, batch, rows, cols};
}

void swizzle_on_cpu(const Params& p);  // for nvfp4_quantize; in swizzle_cpu.cpp
// For nvfp4_gemm; in swizzle_cuda.cu. The stream is a cudaStream_t.
void swizzle_on_cuda(const char* op, const Params& p, void* stream);

}  // namespace n3::nvfp4_swizzle
