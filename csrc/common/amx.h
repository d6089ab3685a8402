// bfloat16 tiles (AMX): how rows of x are packed for TDPBF16PS. Plain data, no torch and no intrinsics; amx_lanes.h has
// those.
//
// Weights are the left tiles, of 16 rows by 32 elements of k, which lie side by side in memory; x is the right one, of
// pairs of k by up to 16 tokens. A step is 32 elements of k.
//
// The summation contract is that of the instruction. Of the pairs of a step the even chain takes the first elements, in
// their order, and the odd chain the second: 16 fused multiply-adds each, from zero. Then output += even + odd, step
// after step. Rounding is to nearest even; subnormal inputs and results count as zero. Missing elements are zeros.
#pragma once
#include <cstdint>

namespace n3::amx {

constexpr int64_t kPanelRows = 32;                // of weights, multiplied together
constexpr int64_t kTileRows = 16;                 // of weights
constexpr int64_t kTileTokens = 16;               // packed together
constexpr int64_t kPairTokens = 2 * kTileTokens;  // multiplied together
constexpr int64_t kStep = 32;                     // elements of k

inline int64_t steps_of(int64_t k) { return (k + kStep - 1) / kStep; }

// Tiles of packed tokens. Fewer than 16 tokens make one narrower tile, more are completed to whole tiles with zeros.
inline int64_t tiles_of(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }
inline int64_t tile_width(int64_t tokens) { return tokens < kTileTokens ? tokens : kTileTokens; }
inline int64_t tile_bytes(int64_t k, int64_t tokens) { return steps_of(k) * tile_width(tokens) * kStep * 2; }

// Bytes of the accumulators of a panel, in pairs of token tiles.
inline int64_t acc_bytes(int64_t tokens) { return (tokens + kPairTokens - 1) / kPairTokens * 4096; }

// Rows of bfloat16 are packed in one part. Rows of floats are in two, x = high + low with 16 bits of it or more: the
// tile of low parts lies behind that of high ones, and takes its turn in every step.
struct Packed {
  const void* x;  // tile after tile
  int64_t tokens, parts;
};

// Packs rows[0 .. count] of bfloat16 as a tile of `width` tokens.
using Pack = void (*)(const void* const* rows, int64_t count, int64_t k, int64_t width, void* tile);

}  // namespace n3::amx
