// nvfp4_quantize: e2m1 codes, one e4m3 scale per 16 elements, one fp32 global scale.
//
//   S_enc = min(2688 / amax, FLT_MAX), 1 if amax = 0       global = 1 / S_enc
//   scale = e4m3(block_amax * (S_enc / 6))                 code   = e2m1(x * min(1 / (scale * (1 / S_enc)), FLT_MAX))
//
// Every operation is one fp32 rounding, in this order (TransformerEngine's), so that all backends give the same bytes.
// Where the stored scale is 0 the codes are 0 too. amax is over finite elements; a block with a NaN or an infinity has
// scale NaN (0x7f) and codes 0, and nothing else in the tensor sees it. -0 keeps its sign (code 8).
//
// four_over_six: 1536 in place of 2688, base = block_amax / 6 * S_enc, and of the scales e4m3(base), e4m3(base * 1.5)
// the one with the smaller sum over k = 0..15 of |(code * scale) * (1 / S_enc) - x|; the first on a tie.
#pragma once
#include <optional>
#include <string>

#include "../common/check.h"

namespace n3::nvfp4_quantize {

constexpr const char* op = "nvfp4_quantize";

struct Params {
  const void* x;              // [rows, k]
  const float* global_scale;  // null: computed from x
  uint8_t* q;                 // [rows, k / 2]
  uint8_t* block_scale;       // [rows, k / 16], or [ceil128(rows), ceil4(k / 16)] in the 128x4 layout
  float* global_out;
  int64_t rows, k;
  bool four_over_six, swizzled;
};

// Checks one call, for CPU and CUDA alike; returns the problem with null pointers.
inline Params check(const Tensor& x, const std::optional<Tensor>& global_scale, const std::optional<Tensor>& hadamard,
                    const std::optional<Tensor>& seed, const std::string& rounding, bool four_over_six,
                    const std::string& block, const std::string& scale_layout) {
  check_floating(op, "x", x.scalar_type());
  N3_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got 0");
  const int64_t k = x.size(-1);
  N3_CHECK(op, k % 16 == 0, "x must have a last dimension that is a multiple of 16, got ", k);
  if (global_scale) {
    check_dtype(op, "global_scale", *global_scale, ScalarType::Float);
    N3_CHECK(op, global_scale->numel() == 1, "global_scale must have 1 element, got ", global_scale->numel());
    check_same_device(op, "global_scale", *global_scale, "x", x);
  }
  N3_CHECK(op, rounding == "nearest" || rounding == "stochastic", "rounding must be one of nearest, stochastic, got ",
           rounding);
  N3_CHECK(op, block == "1x16" || block == "16x16", "block must be one of 1x16, 16x16, got ", block);
  N3_CHECK(op, scale_layout == "linear" || scale_layout == "128x4", "scale_layout must be one of linear, 128x4, got ",
           scale_layout);
  if (block == "16x16") {
    const int64_t rows = x.dim() > 1 ? x.size(-2) : 1;
    N3_CHECK(op, rows % 16 == 0, "x must have rows in multiples of 16 for block=16x16, got ", rows);
  }
  if (hadamard) {
    check_dtype(op, "hadamard", *hadamard, ScalarType::Float);
    check_shape(op, "hadamard", *hadamard, {16});
  }
  N3_CHECK(op, rounding == "nearest" || seed, "seed must be given for rounding=stochastic, got None");
  if (seed) {
    check_dtype(op, "seed", *seed, ScalarType::Long);
    check_shape(op, "seed", *seed, {2});
  }
  if (hadamard) check_same_device(op, "hadamard", *hadamard, "x", x);
  if (seed) check_same_device(op, "seed", *seed, "x", x);
  N3_CHECK(op, rounding == "nearest", "rounding=stochastic is not covered by the C++ kernel");
  N3_CHECK(op, block == "1x16", "block=16x16 is not covered by the C++ kernel");
  N3_CHECK(op, !hadamard, "hadamard is not covered by the C++ kernel");
  return {nullptr, nullptr,       nullptr, nullptr, nullptr, k ? x.numel() / k : 0, k, four_over_six,
          scale_layout == "128x4"};
}

}  // namespace n3::nvfp4_quantize
