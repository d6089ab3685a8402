// Decay factors of a chunk of ssd_scan, for host and device. Decays are powers of two: a is the sum of
// log2 of the steps' decays from the start of the chunk up to and including a token, <= 0 since A < 0 and dt >= 0.
//
// The decay from token j to token i >= j is exp2(a_i - a_j). Written as exp2(a_i) exp2(-a_j) it overflows. For i in
// block I of kBlock tokens and j in an earlier block it is a product of two factors that are at most 1,
//   exp2(a_i - r_I) * exp2(r_I - a_j),   r_I = a of the last token before block I,
// and underflows only if the decay does. Inside a block it is taken directly. A chunk needs 64 + 96 + 4 * 136
// exponentials so, instead of 2080.
#pragma once
#include "../common/numerics.h"

namespace n3::ssd_scan::sm90 {

constexpr int kTokens = 64;  // of a chunk
constexpr int kBlock = 16;    // tokens of a block: the rows of the tensor core's result that one warp holds
constexpr float kLog2e = 1.4426950408889634f;
// A step that decays by less than 2^-128 is taken as 2^-128: either leaves nothing of what came before, and sums of 64
// steps stay below 8192, so that differences of a between later tokens are good to 2^-11.
constexpr float kLargestStep = 128.f;

// log2 of what one step leaves of the state; NaN stays.
N3_HD float log2_decay(float A, float dt) {
  const float v = A * dt * kLog2e;
  return v < -kLargestStep ? -kLargestStep : v;
}

// From token j to token i >= j of the same block. To be called for those alone: the exponential is masked before, not
// after. (Sums are rounded, so that a may rise by its last bit, and the factor is then 1 + 2^-11 at most.)
N3_HD float decay_between(float a_i, float a_j) { return exp2f(a_i - a_j); }

// Row and column factor of block I > 0; `reference` is r_I. dt of token j goes into its column.
N3_HD float row_factor(float a_i, float reference) { return exp2f(a_i - reference); }
N3_HD float column_factor(float a_j, float reference, float dt_j) { return dt_j * exp2f(reference - a_j); }

// What token j adds to the state after a later token, or itself, whose sum is `a_end`.
N3_HD float end_factor(float a_j, float a_end, float dt_j) { return dt_j * exp2f(a_end - a_j); }

// Column factors are kept for blocks 1, 2, 3 with 16, 32, 48 columns: where block I begins among the 96.
N3_HD int first_column(int block) { return kBlock * block * (block - 1) / 2; }
constexpr int kColumnFactors = 96;

}  // namespace n3::ssd_scan::sm90
