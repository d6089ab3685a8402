// The product of bfloat16 activations with NVFP4 weights in AMX tiles: every number of tokens goes through them, so
// that a row's bits do not depend on it. Plain data, no torch: linear_amx.cpp includes it too.
//
// The summation contract is TDPBF16PS's. A step is two blocks of k, the last one completed with zeros. Of each block
// the even chain takes elements 0, 8, 1, 9, 2, 10, 3, 11 and the odd chain 4, 12, 5, 13, 6, 14, 7, 15, first of the
// even block of the step, then of the odd one: 16 fused multiply-adds each, from zero. Then output += even + odd, step
// after step. Rounding is to nearest even; subnormal inputs and results count as zero.
#pragma once
#include <algorithm>
#include <cstdint>

#include "linear_kernels.h"

namespace n3::nvfp4_linear::amx {

constexpr int64_t kPanelRows = 32;                // most rows of weights in a call
constexpr int64_t kTileTokens = 16;               // packed together
constexpr int64_t kPairTokens = 2 * kTileTokens;  // multiplied together
constexpr int64_t kStep = 32;                     // elements of k

inline int64_t steps_of(int64_t k) { return (k + kStep - 1) / kStep; }

// Tokens in each of several calls of nearly equal size: so many that their packed x and a decoded panel stay in a
// level-2 cache of 2 MiB.
inline int64_t tokens_per_call(int64_t tokens, int64_t k) {
  const int64_t most = std::clamp<int64_t>((1 << 19) / k / kPairTokens * kPairTokens, kPairTokens, 256);
  const int64_t calls = (tokens + most - 1) / most, each = (tokens + calls - 1) / calls;
  return calls == 1 ? tokens : (each + kPairTokens - 1) / kPairTokens * kPairTokens;
}

// Tiles of packed tokens. Fewer than 16 tokens make one narrower tile, more are completed to whole tiles with zeros.
inline int64_t tiles_of(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }
inline int64_t tile_width(int64_t tokens) { return tokens < kTileTokens ? tokens : kTileTokens; }
inline int64_t tile_bytes(int64_t k, int64_t tokens) { return steps_of(k) * tile_width(tokens) * kStep * 2; }

// Where the sums of a panel go: y[token * stride + row] = act(sum * global + bias[row]), bfloat16, rounded once.
struct Outputs {
  float global;
  const void* bias;  // bfloat16, of the panel's rows, or null
  bool relu2;
  void* y;
  int64_t stride;
};

// Of panels of at most kPanelRows rows; x is packed tile after tile.
struct Kernels {
  Decoding decoding;
  int64_t (*scratch_bytes)(int64_t k, int64_t tokens);
  // Packs rows[0 .. count] of bfloat16 as a tile of `width` tokens.
  void (*pack)(const void* const* rows, int64_t count, int64_t k, int64_t width, void* tile);
  // out[token * kPanelRows + row]: the sums themselves.
  void (*sums)(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch, float* out);
  void (*product)(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch,
                  const Outputs& out);
};

extern const Kernels kKernels;

}  // namespace n3::nvfp4_linear::amx
