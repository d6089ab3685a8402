// How moe_experts with NVFP4 weights runs on sm_90a: stages of codes and scales, the order of k, how a weight becomes a
// bfloat16; the work list is that of the dense kernel (experts_plan.h). Host arithmetic and functions of the kernel.
//
// The weights are read where the checkpoint has them. A unit is 128 rows by 128 k: 64 bytes of codes and 8 scales per
// row. The four threads that hold a row of operand a take 16 bytes each, 32 neighbouring k: two whole scale blocks. A
// product may sum in any order of k, so operand b is laid out in the order that this gives, position_of.
#pragma once
#include "experts_plan.h"

namespace n3::moe_experts::sm90::nvfp4 {

constexpr int kUnit = 128;     // rows and k of a unit
constexpr int kPerScale = 16;  // k

// A stage holds a unit: codes in boxes [half of the rows, parity of the row] of 32 rows of 64 bytes, swizzled; then the
// scales, as bfloat16, in that order of rows.
constexpr int kBox = 32 * 64, kCodes = 4 * kBox;
template <typename Tile>
using PackedRing = Ring<Tile, kCodes + kUnit * kUnit / kPerScale * 2, 20>;

// Of a gate's sums the registers have no room beside the outputs of the largest template: 8 tokens have.
template <typename Tile, bool kGated>
constexpr bool kHasRoom = !kGated || Tile::kTiles * Tile::kTokens / 2 <= 128;

inline Kernel kernel_for(int64_t width, bool gated) {
  const Kernel kernel = sm90::kernel_for(width);
  return gated && kernel == Kernel::kTile2688 ? Kernel::kTile3584 : kernel;
}

N3_HD int codes_at(int half, int parity) { return (2 * half + parity) * kBox; }
N3_HD int scales_at(int half, int parity, int row) { return kCodes + ((2 * half + parity) * 32 + row) * 16; }

// Rows of 64 bytes: bits 4 and 5 of an offset are exchanged as the copy engine does it.
N3_HD int swizzled_half(int offset) { return offset ^ ((offset >> 7 & 3) << 4); }

// Where k, 0 .. 127 of a unit, stands in operand b. Thread t of four has k 32 t ..; its word j holds 8 of them, and
// codes_bf16<c> puts codes c and c + 4 of a word in the halves of a register: those of 2 i and 2 i + 1 are k 2t, 2t + 1
// and 2t + 8, 2t + 9 of the 16 of the product 2 j + i.
N3_HD int position_of(int k) {
  const int thread = k / 32, word = k / 8 % 4, half = k / 4 % 2, step = k / 2 % 2, upper = k % 2;
  return 16 * (2 * word + step) + 8 * upper + 2 * thread + half;
}

// ---------------------------------------------------------------- decoding

// Codes c and c + 4 of the eight in a word, the first in the lowest bits, as bfloat16 times 2^-126 in the halves of a
// word: the sign at bit 15, the magnitude at bits 8 .. 6, where 0.5 is a subnormal.
template <int c>
N3_HD uint32_t codes_bf16(uint32_t w) {
  constexpr int kUp = 6 - 4 * c;
  return (w << (12 - 4 * c) & 0x80008000) | ((kUp > 0 ? w << (kUp & 31) : w >> (-kUp & 31)) & 0x01c001c0);
}

// A decoded weight is e2m1 * e4m3 * 2^-8 * 2^fold, exact in bfloat16 and far from its ends; 2^fold is the power of two
// in the global scale, so that sums of huge activations do not overflow where the results do not. As codes come times
// 2^-126, they are multiplied by 2^(118 + fold) times their scale; sums are to be multiplied by 2^8, then by `rest`.
struct Global {
  uint32_t factor;  // 2^(119 + fold) as bfloat16: what half a scale lacks
  float rest;
};

N3_HD Global global_of(float global) {
  int fold = int(float_bits(global) >> 23 & 0xff) - 127;
  fold = fold < -100 ? -100 : fold > 1 ? 1 : fold;
  return {uint32_t(119 + fold + 127) << 7, global * bits_float(uint32_t(127 - fold) << 23)};
}

N3_HD float finished(float sum, float rest) { return sum * 256.f * rest; }

}  // namespace n3::moe_experts::sm90::nvfp4
