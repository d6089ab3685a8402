// What the epilogues of nvfp4_gemm.quantized do with float32 results: activation, then 16 columns of a row become codes
// and a scale, as by nvfp4_quantize to the bit. Without CUTLASS, so that the emulator runs it.
#pragma once
#include "gemm_plan.h"
#include "quantize_block.cuh"

namespace n3::nvfp4_gemm {

using nvfp4_quantize::Global;
using nvfp4_quantize::kInfinity;
using nvfp4_quantize::Quantised;

N3_DEVICE float activated(float v, bool relu2) {
  const float positive = v < 0.f ? 0.f : v;  // keeps NaN
  return relu2 ? positive * positive : v;
}

// The scale (row, c) of a result of `rows` rows with ks scales each; what only pads the tiles becomes 0.
N3_DEVICE void store_scale(const Codes& out, int64_t row, int64_t c, int64_t rows, int64_t ks, uint8_t byte) {
  const bool real = row < rows && c < ks;
  if (!out.swizzled) {
    if (real) out.scale[row * ks + c] = byte;
  } else if (row < nvfp4_swizzle::padded_rows(rows) && c < nvfp4_swizzle::padded_cols(ks)) {
    out.scale[scale_128x4(row, c, ks)] = real ? byte : 0;
  }
}

// A block in one thread.
N3_DEVICE Quantised quantised(const float (&v)[16], const Global& g) {
  const uint32_t top = nvfp4_quantize::magnitude_max(v);
  if (top >= kInfinity) return {{}, 0x7f};
  const uint8_t byte = nvfp4_quantize::plain_scale(top, g);
  return {nvfp4_quantize::codes_of(v, byte, g.inv, nullptr, 0), byte};
}

// A block in the four threads of a quad, four values each: returns the scale and leaves in v what to round to e2m1.
N3_DEVICE uint8_t scaled_by_quad(float (&v)[4], const Global& g) {
  float most = nvfp4_quantize::max_nan(nvfp4_quantize::max_nan(fabsf(v[0]), fabsf(v[1])),
                                       nvfp4_quantize::max_nan(fabsf(v[2]), fabsf(v[3])));
  uint32_t top = float_bits(most);
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) top = max(top, __shfl_xor_sync(0xffffffff, top, lane));  // of NaN: the largest
  const uint8_t byte = top < kInfinity ? nvfp4_quantize::plain_scale(top, g) : uint8_t(0x7f);
  const float factor = nvfp4_quantize::encode_factor(byte, g.inv);
  const bool codes = top < kInfinity && (byte & 0x7f);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = codes ? v[i] * factor : 0.f;
  return byte;
}

}  // namespace n3::nvfp4_gemm
