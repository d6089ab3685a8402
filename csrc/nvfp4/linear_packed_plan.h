// How nvfp4_linear.packed runs: which kernel, on which grid, who sums which k. Pure host arithmetic and, where marked
// N3_HD, the very functions that the kernels call.
#pragma once
#include <cstdint>
#include <type_traits>

#include "repack_plan.h"

namespace n3::nvfp4_linear_packed {

namespace blob = n3::nvfp4_repack;

enum class Kernel { kStream1, kStream2, kStream4, kStream8, kWide64, kWide128, kWide256, kDense };

// What a GPU has beyond sm_80: blocks that read each other's shared memory (from sm_90 on), and the products of
// warpgroups (sm_90a alone).
struct Cores {
  bool clusters, warpgroups;
};
inline Cores cores_of(int capability) { return {capability >= 90, capability == 90}; }

// A part of the tiles along k.
struct Range {
  int32_t begin, end;
};
N3_HD Range part_of(int32_t tiles, int32_t parts, int32_t part) {
  return {int32_t(int64_t(tiles) * part / parts), int32_t(int64_t(tiles) * (part + 1) / parts)};
}

// ---------------------------------------------------------------- few tokens: weights streamed, split along k

constexpr int kStreamWarps = 8, kStreamThreads = 32 * kStreamWarps, kMostSplits = 8;

// Outputs of a block: 16 kTiles rows of the weights, 8 kGroups tokens. kAhead: tiles of each row that a warp has under
// way; kBlocks: per multiprocessor. More rows per block read x less often, more tokens need more of them.
template <int kGroups_, int kTiles_, int kAhead_, int kBlocks_>
struct Stream {
  static constexpr int kGroups = kGroups_, kTiles = kTiles_, kAhead = kAhead_, kBlocks = kBlocks_;
  static constexpr int kStage = kGroups * 8 * 128;             // bytes: 64 k of the tokens
  static constexpr int kSums = kTiles * kGroups * 32;          // of four floats
  static constexpr int kShared = kStreamWarps * (kAhead * kStage > 16 * kSums ? kAhead * kStage : 16 * kSums);
  static constexpr int kInFlight = kBlocks * kStreamWarps * kAhead * kTiles * blob::kTile;  // bytes of weights per SM
  static_assert(kInFlight >= 18 * 1024);  // 3.35 TB/s for 700 ns, of 132 multiprocessors
};
using Stream1 = Stream<1, 1, 4, 2>;
using Stream2 = Stream<1, 2, 2, 2>;
using Stream4 = Stream<2, 4, 2, 1>;
using Stream8 = Stream<4, 4, 2, 1>;

// The k tiles of warp `warp` of the block of rank `rank`: first, first + kStreamWarps, ... before end.
N3_HD Range warp_tiles(int32_t tiles, int32_t splits, int32_t rank, int32_t warp) {
  const Range part = part_of(tiles, splits, rank);
  return {part.begin + warp, part.end};
}

// How many blocks share the k of their rows. A block's time is about that of its longest warp, in tiles, and one tile's
// for starting and summing; at most half of the warps go without a tile. Blocks run in waves of 132, an H100's
// multiprocessors: a constant, so that a result does not depend on which of these GPUs computes it.
constexpr int kMultiprocessors = 132;

inline int32_t splits_for(int64_t groups, int64_t tiles) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int32_t best = 1;
  int64_t least = 0;
  for (int32_t s = 1; s <= kMostSplits && (s == 1 || 2 * tiles >= int64_t(s) * kStreamWarps); s *= 2) {
    const int64_t time = ceil(groups * s, kMultiprocessors) * (ceil(ceil(tiles, s), kStreamWarps) + 1);
    if (s == 1 || time < least) best = s, least = time;
  }
  return best;
}

// ---------------------------------------------------------------- many tokens: warpgroup products (sm_90a)

constexpr int kWideRows = 128;     // of the weights: two warpgroups of 64
constexpr int kWideThreads = 384;  // and one that loads tokens
constexpr int kWideStages = 4;

template <int kTokens_>
struct Wide {
  static constexpr int kTokens = kTokens_, kProducts = kTokens > 128 ? kTokens / 128 : 1;
  static constexpr int kWidth = kTokens / kProducts;                   // of one product
  static constexpr int kStage = kTokens * 128;                         // bytes: 64 k of the tokens
  static constexpr int kRowBytes = 2 * kWideRows + 16;                 // of a token of the results; + 16: other banks
  static constexpr int kBarriersAt = kWideStages * kStage > kTokens * kRowBytes ? kWideStages * kStage
                                                                                : kTokens * kRowBytes;
  static constexpr int kShared = kBarriersAt + 2 * 8 * kWideStages;
  static_assert(kBarriersAt % 16 == 0 && kShared <= 232448);
};
using Wide64 = Wide<64>;
using Wide128 = Wide<128>;
using Wide256 = Wide<256>;

// ---------------------------------------------------------------- very many tokens: decoded once, torch's product

constexpr int kDenseThreads = 256;

// Tokens at a time: their sums, 32 MB of float32, are read again while L2 has them.
inline int64_t dense_rows(int64_t n) {
  const int64_t rows = (int64_t(1) << 23) / n / 256 * 256;
  return rows < 256 ? 256 : rows;
}
inline int64_t finish_blocks(int64_t rows, int64_t n) { return (rows * n + kDenseThreads - 1) / kDenseThreads; }

// ---------------------------------------------------------------- the choice

constexpr int64_t kStreamTokens = 32;   // most tokens of a block of Stream8
// From here on: decoded once, then torch's product. Derived, not measured. Decoding moves 4.6 bytes per weight, a pass
// of Stream8 reads 0.56 and takes about twice the time of reading: without warpgroups four passes cost as much.
constexpr int64_t kDenseTokens = 4096, kDenseTokensOfStreams = 4 * kStreamTokens + 1;

struct Plan {
  Kernel kernel;
  int32_t splits;       // stream: blocks of a cluster
  int32_t row_groups;   // blocks along the rows of the weights
  int32_t token_groups;
  int64_t blocks;
  int threads, shared;
};

// Calls f with a null pointer of the kernel's shape.
template <typename F>
auto with_stream(Kernel kernel, F f) {
  switch (kernel) {
    case Kernel::kStream1: return f(static_cast<Stream1*>(nullptr));
    case Kernel::kStream2: return f(static_cast<Stream2*>(nullptr));
    case Kernel::kStream4: return f(static_cast<Stream4*>(nullptr));
    default: return f(static_cast<Stream8*>(nullptr));
  }
}
template <typename F>
auto with_wide(Kernel kernel, F f) {
  switch (kernel) {
    case Kernel::kWide64: return f(static_cast<Wide64*>(nullptr));
    case Kernel::kWide128: return f(static_cast<Wide128*>(nullptr));
    default: return f(static_cast<Wide256*>(nullptr));
  }
}
inline bool streams(Kernel kernel) { return kernel <= Kernel::kStream8; }

inline int64_t groups_of(int64_t size, int64_t group) { return (size + group - 1) / group; }

inline Plan stream_plan(Kernel kernel, int64_t m, int64_t n, int64_t k, bool invariant, Cores cores) {
  return with_stream(kernel, [&](auto* type) {
    using Shape = std::remove_pointer_t<decltype(type)>;
    const int64_t rows = groups_of(n, 16 * Shape::kTiles), tokens = groups_of(m, 8 * Shape::kGroups);
    // What a sum's order depends on: in batch-invariant mode it does not see how many rows a block has.
    const int64_t groups = groups_of(n, 16 * (invariant ? 4 : Shape::kTiles));
    const int32_t splits = cores.clusters ? splits_for(groups, blob::depth_tiles(k)) : 1;
    return Plan{kernel, splits, int32_t(rows), int32_t(tokens), rows * tokens * splits, kStreamThreads, Shape::kShared};
  });
}

inline Plan wide_plan(Kernel kernel, int64_t m, int64_t n) {
  return with_wide(kernel, [&](auto* type) {
    using Shape = std::remove_pointer_t<decltype(type)>;
    const int64_t rows = groups_of(n, kWideRows), tokens = groups_of(m, Shape::kTokens);
    return Plan{kernel, 1, int32_t(rows), int32_t(tokens), rows * tokens, kWideThreads, Shape::kShared};
  });
}

// Clocks of a kernel for more than a few tokens, derived and not measured: per tile of 16 x 64 weights and 32 tokens of
// an even share of all blocks; per step of 64 k of a block, of waves of blocks.
inline int64_t clocks(Kernel kernel, int64_t m, int64_t n, int64_t k) {
  const int64_t tiles = blob::depth_tiles(k);
  if (streams(kernel)) return blob::row_tiles(n) * tiles * groups_of(m, kStreamTokens) * 110 / kMultiprocessors;
  const int64_t step = kernel == Kernel::kWide64 ? 400 : kernel == Kernel::kWide128 ? 560 : 1060;
  return groups_of(wide_plan(kernel, m, n).blocks, kMultiprocessors) * tiles * step;
}

inline Kernel kernel_for(int64_t m, int64_t n, int64_t k, bool invariant, Cores cores) {
  if (m <= 4) return Kernel::kStream1;
  if (m <= 8) return Kernel::kStream2;
  if (m <= 16) return Kernel::kStream4;
  if (m <= kStreamTokens || invariant) return Kernel::kStream8;
  if (m >= (cores.warpgroups ? kDenseTokens : kDenseTokensOfStreams)) return Kernel::kDense;
  if (!cores.warpgroups) return Kernel::kStream8;
  Kernel best = Kernel::kWide256;
  for (const Kernel other : {Kernel::kWide128, Kernel::kWide64, Kernel::kStream8}) {
    if (clocks(other, m, n, k) < clocks(best, m, n, k)) best = other;
  }
  return best;
}

// In batch-invariant mode every number of tokens is streamed, in one order of summation.
inline Plan plan(int64_t m, int64_t n, int64_t k, bool invariant, Cores cores) {
  const Kernel kernel = kernel_for(m, n, k, invariant, cores);
  if (kernel == Kernel::kDense) return {kernel, 1, 0, 0, 0, 0, 0};
  return streams(kernel) ? stream_plan(kernel, m, n, k, invariant, cores) : wide_plan(kernel, m, n);
}

}  // namespace n3::nvfp4_linear_packed
