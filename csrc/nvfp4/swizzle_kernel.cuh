// Block scales between row-major and 128x4 tiles.
#pragma once
#include "../common/device.cuh"
#include "swizzle_plan.h"

namespace n3::nvfp4_swizzle {

//   grid  one block per kThreads words     block kThreads     smem  none
// A word is 4 neighbouring scales of one row: aligned in the tiled layout, not in the plain one, whose rows may have
// any length. Padding reads as zero.
template <bool kInverse>
__global__ __launch_bounds__(kThreads) void swizzle_kernel(const uint8_t* __restrict__ in, uint8_t* __restrict__ out,
                                                           int64_t words, int64_t rows, int64_t cols) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const int64_t row_words = padded_cols(cols) / 4, walked_rows = kInverse ? rows : padded_rows(rows);
  const int64_t c = i % row_words * 4, r = i / row_words % walked_rows, batch = i / row_words / walked_rows;
  const int64_t plain = (batch * rows + r) * cols + c;
  const int64_t tiled = batch * padded_rows(rows) * padded_cols(cols) + scale_128x4(r, c, cols);
  if constexpr (kInverse) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(in + tiled);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c + j < cols) out[plain + j] = uint8_t(word >> 8 * j);
    }
  } else {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (r < rows && c + j < cols) word |= uint32_t(in[plain + j]) << 8 * j;
    }
    *reinterpret_cast<uint32_t*>(out + tiled) = word;
  }
}

}  // namespace n3::nvfp4_swizzle
