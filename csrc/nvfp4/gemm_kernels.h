// What gemm_engine_cpu.cpp asks of each instruction set, and the summation contract all of them keep.
//
// Twice an e2m1 value is a small integer, so the product of two blocks of 16 is an exact integer below 2^12, and the
// product of their scales has 8 significant bits. One output is one chain of fused multiply-adds over the blocks in
// order of k, sum = fma(dot, a_scale / 4 * b_scale, sum), which rounds once per 16 terms. The contract does not mention
// the number of tokens, rows or threads, nor the vector length, so none of them shows in the bits.
#pragma once
#include <cstdint>

namespace n3::nvfp4_gemm {

constexpr int64_t kTokens = 256;  // most tokens packed at a time: with their rows of b they stay in level 2
constexpr int64_t kMaxTile = 6;   // most tokens in a register tile
constexpr int64_t kMaxRows = 64;  // most rows of b per call of sums

// Tokens in tiles of nearly equal width: 8 are 4 + 4, not 6 + 2.
struct Tiles {
  int64_t tokens;
  int64_t count() const { return (tokens + kMaxTile - 1) / kMaxTile; }
  int64_t begin(int64_t i) const { return tokens * i / count(); }
};

// Rows first ... first + rows of a matrix [total, k] with its block scales.
struct Rows {
  const uint8_t *q, *scale;  // of the whole matrix
  bool swizzled;
  int64_t first, rows, blocks;  // blocks = k / 16
};

// Tokens as the kernels read them, tile after tile, each [blocks, width]: codes doubled, in the order of k that
// decoding b gives; what makes up for the 12 that is added to the codes of b; scales over 4.
struct Tokens {
  int8_t (*codes)[16];
  int32_t* init;
  float* scale;
};

struct Kernels {
  int64_t panel_rows;  // rows of b per call of sums, at most: 16 times a number
  int64_t (*scratch_bytes)();
  void (*pack)(const Rows& tokens, const Tokens& packed);  // one tile of at most kMaxTile rows
  // out[token * panel_rows + row] for the rows of b; the tokens are packed tile after tile.
  void (*sums)(const Rows& b, const Tokens& packed, int64_t tokens, void* scratch, float* out);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kVnniKernels;

const Kernels& kernels();  // of the instruction set that cpu_isa() names

}  // namespace n3::nvfp4_gemm
