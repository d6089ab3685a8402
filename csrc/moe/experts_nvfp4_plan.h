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
constexpr int kLoaders = 3;    // warps that fetch scales and inputs

// Byte offsets from a start that is a multiple of 1024. A stage holds a unit: codes in boxes [half of the rows, parity
// of the row] of 32 rows of 64 bytes, swizzled; then the scales, as bfloat16, in that order of rows.
template <typename Tile>
struct Shared {
  static constexpr int kBox = 32 * 64;
  static constexpr int kCodes = 4 * kBox, kScales = kUnit * kUnit / kPerScale * 2, kStage = kCodes + kScales;
  static constexpr int kBlock = Tile::kTokens * 128;  // 64 k of each token: operand b, in rows of 128 bytes
  static constexpr int kInputs = (Tile::kWidth / 64) * kBlock;
  static constexpr int kHidden = 2 * 2 * kBlock;      // twice, of two chunks of the inner size
  static constexpr int kBefore = 4 * (kMostExperts + 4);
  static constexpr int kTotals = 4 * (kThreads / 32);
  static constexpr int kMostStages = 20;
  static constexpr int kBarriers = 8 * (2 * kMostStages + 2);
  static constexpr int kFit = (kSharedLimit - kInputs - kHidden - kBefore - kTotals - kBarriers) / kStage;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static_assert(kStages >= 8, "too few loads under way to keep the memory busy");
  static_assert(kStage % 1024 == 0 && kBlock % 1024 == 0 && kBefore % 16 == 0 && kTotals % 16 == 0);

  static constexpr int kInputsAt = kStages * kStage;
  static constexpr int kHiddenAt = kInputsAt + kInputs;
  static constexpr int kBeforeAt = kHiddenAt + kHidden;
  static constexpr int kTotalsAt = kBeforeAt + kBefore;
  static constexpr int kBarriersAt = kTotalsAt + kTotals;
  static constexpr int kBytes = kBarriersAt + kBarriers;
  static_assert(kBytes <= kSharedLimit && kBarriersAt % 8 == 0);

  N3_HD static int stage_at(int stage) { return stage * kStage; }
  N3_HD static int codes_at(int half, int parity) { return (2 * half + parity) * kBox; }                // in a stage
  N3_HD static int scales_at(int half, int parity, int row) { return kCodes + ((2 * half + parity) * 32 + row) * 16; }
  N3_HD static int inputs_at(int block) { return kInputsAt + block * kBlock; }
  N3_HD static int hidden_at(int slot, int block) { return kHiddenAt + (2 * slot + block) * kBlock; }
};

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

// ---------------------------------------------------------------- the plan

inline Plan plan(int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t inner,
                 int64_t multiprocessors) {
  Plan p = sm90::plan(tokens, top_k, experts, width, inner, multiprocessors);
  with_tile(p.kernel, [&](auto* type) {
    using S = Shared<std::remove_pointer_t<decltype(type)>>;
    p.shared = S::kBytes, p.stages = S::kStages;
  });
  return p;
}

}  // namespace n3::moe_experts::sm90::nvfp4
