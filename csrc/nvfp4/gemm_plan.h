// How nvfp4_gemm and nvfp4_grouped_gemm run on GPUs with block-scaled tensor cores (sm_100, sm_120): what they cover
// and with which tile. Pure host arithmetic; no CUTLASS, no torch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/numerics.h"

namespace n3::nvfp4_gemm {

enum class Out { kFloat, kHalf, kBFloat16, kCodes };  // kCodes: nvfp4_gemm.quantized

enum class Tile { kSmall, kLarge };  // of sm_100; sm_120 has one

// What nvfp4_gemm.quantized writes beside its codes, which lie at y.
struct Codes {
  uint8_t* scale;       // [m, n / 16], or 128x4 tiles, whose padding becomes 0
  const float* global;  // decode scale
  bool swizzled, relu2;
};

// What a kernel needs of one call; the matrices are contiguous and begin at multiples of 16 bytes, their block scales
// lie in 128x4 tiles with zero padding.
struct Call {
  const uint8_t *a, *a_scale, *b, *b_scale;
  const float *a_global, *b_global;
  bool a_global_per_row, b_global_per_row;
  const void* bias;  // [n], or null; beside codes float32
  void* y;           // [m, n]
  int64_t m, n, k;
  int sms;
  Codes codes = {};
};

constexpr int64_t kTileRows = 128, kTileScales = 4, kTileBytes = kTileRows * kTileScales;

constexpr int64_t out_bits(Out out) { return out == Out::kFloat ? 32 : out == Out::kCodes ? 4 : 16; }

// Why the kernels do not take a problem, or null; block_scaled_cores in n3kernels/nvfp4/_supports.py asks first, in the
// same words. Rows of a, b and y are copied by TMA, which wants them to begin at multiples of 16 bytes.
inline const char* unsupported(int64_t m, int64_t n, int64_t k, Out out, bool a_swizzled, bool b_swizzled) {
  if (k % 32) return "takes K that is a multiple of 32: its rows are copied in units of 16 bytes";
  if (n * out_bits(out) % 128) {
    return out == Out::kCodes ? "takes N that is a multiple of 32: rows of codes are copied in units of 16 bytes"
                              : "takes N of whole 16 bytes of the result: multiples of 8, in float32 of 4";
  }
  if ((a_swizzled || b_swizzled) && k % 64) {
    return "takes K that is a multiple of 64 with 128x4 scales: the padding of their last tile would be multiplied";
  }
  const int64_t limit = int64_t(1) << 31, scales = (k + 63) / 64 * kTileScales;
  if (m >= limit || n >= limit || k >= limit || (m + 127) * scales >= limit || (n + 127) * scales >= limit) {
    return "takes fewer than 2^31 rows, columns and block scales of a matrix";
  }
  return nullptr;
}

// A tile of 256 x 256 by two SMs reads each operand less often than one of 128 x 64, but only a result of enough tiles
// gives every SM one. In batch-invariant mode the tile does not depend on m. The bound is arithmetic, not measured.
inline Tile tile(int64_t m, int64_t n, int sms, bool invariant) {
  const int64_t tiles = (m + 255) / 256 * ((n + 255) / 256);
  return invariant || (m > kTileRows && 2 * tiles >= sms) ? Tile::kLarge : Tile::kSmall;
}

}  // namespace n3::nvfp4_gemm
