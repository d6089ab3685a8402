// How grouped_linear with NVFP4 weights runs on sm_90a: stages of rows and codes, which row of the weights is whose,
// where its results go. Host arithmetic and functions of the kernel.
//
// Weights are read where the checkpoint has them, in pieces of 128 rows by 128 k, and decoded in registers as operand
// a; so x has to be in the order of k that this gives (experts_nvfp4_plan.h: position_of). A tile has two pieces, one
// for each warpgroup; or gated, one of gates and one of what they gate, and each warpgroup half of both.
#pragma once
#include "experts_nvfp4_plan.h"
#include "grouped_plan.h"

namespace n3::grouped_linear::sm90 {

namespace nvfp4 = moe_experts::sm90::nvfp4;

constexpr int kPiece = nvfp4::kUnit;            // rows and k
constexpr int kBox = kPiece / 2 * kPiece / 2;   // bytes of a piece's even or odd rows, as the copy engine brings them
template <int kRows>
using Packed = Shared<kRows, kPiece, 4 * kBox>;

N3_HD int64_t ordered(int64_t k) { return (k + kPiece - 1) / kPiece * kPiece; }

// Operand a of 64 rows: its row 16 warp + 8 half + q, of the 64 that are number `part` of a piece, is this row of the
// piece. Ordered results of a thread, and those of neighbouring q, are so neighbours in the order: see place_of.
N3_HD int row_of(To to, int part, int warp, int q, int half) {
  if (to == To::kOrdered) return q % 4 * 32 + 8 * warp + 4 * half + 2 * part + q / 4;
  return 64 * part + 16 * warp + 2 * q + half;
}

// Where the results of halves 0 and 1 stand, in the piece's 128.
N3_HD int place_of(To to, int part, int warp, int q) {
  return to == To::kOrdered ? 32 * warp + 16 * part + 2 * q : row_of(to, part, warp, q, 0);
}

// The bytes of a thread's codes in its piece: 32 k, number t of four.
N3_HD int codes_at(int row, int t) { return row % 2 * kBox + nvfp4::swizzled_half(row / 2 * 64 + 16 * t); }

}  // namespace n3::grouped_linear::sm90
