// What linear_cpu.cpp asks of each instruction set, and the summation contract all of them keep.
//
// One output is 32 chains of fused multiply-adds: chain (p, j) takes element j of every block of parity p, in order of
// k. Then, j = 4i + r: over r as (0 + 2) + (1 + 3), over p, over i as (0 + 2) + (1 + 3). The contract does not mention
// the number of tokens, rows or threads, nor the vector length, so none of them shows in the bits.
#pragma once
#include <cstdint>

namespace n3::nvfp4_linear {

constexpr int64_t kChunk = 32;    // elements of k decoded at a time: two blocks
constexpr int64_t kTokens = 256;  // most tokens per call of sums: their packed x stays in the last-level cache
constexpr int64_t kMaxTile = 6;   // most tokens in a register tile

// Tokens in tiles of nearly equal width: 8 are 4 + 4, not 6 + 2.
struct Tiles {
  int64_t tokens;
  int64_t count() const { return (tokens + kMaxTile - 1) / kMaxTile; }
  int64_t begin(int64_t i) const { return tokens * i / count(); }
};

// A panel of weight rows: q [rows, k / 2], scale [rows, k / 16].
struct Panel {
  const uint8_t *q, *scale;
  int64_t rows, k;
};

using Values = float[256][16];  // [scale byte][code]: e2m1 * e4m3 * 2^e

// The decoding table of a set of kernels.
struct Decoding {
  int64_t table_bytes;
  void (*prepare)(const Values& values, void* table);
};

struct Kernels {
  Decoding decoding;
  // Packs one row of x as token `t` of a tile of `width`, with zeros after k.
  void (*pack)(const float* x, int64_t k, int64_t width, int64_t t, float* packed_tile);
  // Rows per panel, and the scratch for one.
  int64_t (*panel_rows)(int64_t k, int64_t tokens);
  int64_t (*scratch_bytes)(int64_t k, int64_t tokens);
  // out[token][row], x packed tile after tile.
  void (*sums)(const void* table, const Panel& panel, const float* x, int64_t tokens, void* scratch, float* out);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::nvfp4_linear
