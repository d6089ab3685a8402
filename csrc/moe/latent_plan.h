// How latent_moe_front and latent_moe_tail run on sm_90: which block multiplies which rows of the weights over which
// part of their columns, and shared memory. Pure host arithmetic and, where marked N3_HD, the very functions that the
// kernel calls.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/numerics.h"

namespace n3::latent_moe::sm90 {

constexpr int kRows = 64;              // of the weights: operand a of one warpgroup
constexpr int kRowBytes = 128;         // of a step: 64 columns of bfloat16, 32 of float32
constexpr int kMultiprocessors = 132;  // of an H100: a constant, so that no result depends on which of these GPUs ran
constexpr int kMostParts = 8;          // blocks of a cluster
constexpr int kMostTokens = 512;       // beyond, products and not memory bound the time
constexpr int kInvariantTokens = 64;   // of a tile in batch-invariant mode, whatever the number of tokens

// ---------------------------------------------------------------- shared memory

// What a block multiplies at a time: the rows of kGroups warpgroups and kTokens tokens. For few tokens two blocks run
// on a multiprocessor. Tokens come from the L2 cache as often as there are tiles of rows: for many tokens these are
// long.
//
// Stages of the weights for one step, and of as many columns of the tokens: rows of 128 bytes both, at multiples of
// 1024, the length of the swizzle pattern. In the end they make room for the sums, by tokens.
template <int kTokens_, int kGroups_>
struct Tile {
  static constexpr int kTokens = kTokens_, kGroups = kGroups_, kRows = kGroups * sm90::kRows;
  static constexpr int kBlocks = 2 / kGroups, kThreads = 128 * kGroups + 32;  // one warp loads
  static constexpr int kSharedLimit = 233472 / kBlocks - 1024;  // 228 KiB, of which 1 KiB per block is the system's
  static constexpr int kWeights = kRows * kRowBytes, kStage = kWeights + kTokens * kRowBytes;
  static constexpr int kFit = (kSharedLimit - 256) / kStage, kStages = kFit < 12 ? kFit : 12;
  static constexpr int kSumRow = kRows + 4;  // floats of a token; + 4: a warp's stores meet all banks
  static constexpr int kSums = 4 * kTokens * kSumRow;
  static constexpr int kBarriersAt = kStages * kStage;
  static constexpr int kBytes = kBarriersAt + 2 * 8 * kStages;
  static_assert(kTokens % 8 == 0 && kStage % 1024 == 0 && kSums <= kBarriersAt && kBytes <= kSharedLimit);
  // 3.35 TB/s for 700 ns are 18 KiB under way per multiprocessor; three times as much also fills gaps.
  static_assert(kBlocks * kStages * kWeights >= 3 * 18 * 1024);
};

inline int tokens_of_tile(int64_t tokens, bool invariant) {
  if (invariant) return kInvariantTokens;
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : tokens <= 64 ? 64 : 128;
}

// Calls f with a null pointer of the template's type.
template <typename F>
auto with_tile(int tokens, F f) {
  switch (tokens) {
    case 8: return f(static_cast<Tile<8, 1>*>(nullptr));
    case 16: return f(static_cast<Tile<16, 1>*>(nullptr));
    case 32: return f(static_cast<Tile<32, 1>*>(nullptr));
    case 64: return f(static_cast<Tile<64, 2>*>(nullptr));
    default: return f(static_cast<Tile<128, 2>*>(nullptr));
  }
}

// ---------------------------------------------------------------- work

// Outputs of one kind: tiles of rows of their weights, the steps of a tile, and in how many parts blocks share these.
struct Section {
  int32_t tiles, steps, parts;
};

// Blocks of a cluster are neighbours: first all parts of one tile, then of the next. Clusters of neighbouring numbers
// have the same tiles and other tokens: they find the weights in the L2 cache.
struct Work {
  Section sections[3];
  int32_t cluster, token_tiles;
};

constexpr int32_t ceil_div(int64_t a, int64_t b) { return int32_t((a + b - 1) / b); }

N3_HD int32_t clusters_of(const Section& s, int32_t cluster) {
  return int32_t((int64_t(s.tiles) * s.parts + cluster - 1) / cluster);
}

// What a block does: nothing where `tile` is not below its section's.
struct Place {
  int32_t section, tile, part, token_tile;
};

N3_HD Place place_of(const Work& w, int64_t block) {
  const int32_t rank = int32_t(block % w.cluster);
  const int64_t cluster = block / w.cluster;
  int32_t left = int32_t(cluster / w.token_tiles), section = 0;
  for (; section < 2 && left >= clusters_of(w.sections[section], w.cluster); ++section) {
    left -= clusters_of(w.sections[section], w.cluster);
  }
  const int32_t parts = w.sections[section].parts;
  return {section, left * (w.cluster / parts) + rank / parts, rank % parts, int32_t(cluster % w.token_tiles)};
}

struct Range {
  int32_t begin, end;
};

N3_HD Range steps_of(const Section& s, int32_t part) {
  return {int32_t(int64_t(s.steps) * part / s.parts), int32_t(int64_t(s.steps) * (part + 1) / s.parts)};
}

// Cuts the steps so that all multiprocessors read weights from the beginning to the end: the longest part is as short
// as it can be with all blocks of 64 rows running at once, two per multiprocessor. A function of the sizes alone, since
// sums are grouped by it.
inline void share(Work& w) {
  int32_t most = 1;
  for (const Section& s : w.sections) most = s.tiles ? std::max(most, s.steps) : most;
  for (int32_t longest = 1;; ++longest) {
    w.cluster = 1;
    for (Section& s : w.sections) {
      s.parts = 1;
      while (s.tiles && s.parts < kMostParts && ceil_div(s.steps, s.parts) > longest) s.parts *= 2;
      w.cluster = std::max(w.cluster, s.parts);
    }
    int64_t blocks = 0;
    for (const Section& s : w.sections) blocks += int64_t(clusters_of(s, w.cluster)) * w.cluster;
    if (blocks <= 2 * kMultiprocessors || longest >= most) return;
  }
}

struct Plan {
  Work work;
  int tokens;  // of a tile
  int rows, threads, shared, stages;
  int64_t blocks;
};

inline Plan plan(int64_t tokens, Work work, bool invariant) {
  share(work);
  const int tile = tokens_of_tile(tokens, invariant);
  work.token_tiles = ceil_div(tokens, tile);
  return with_tile(tile, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    int64_t clusters = 0;
    for (Section& s : work.sections) {
      s.tiles = ceil_div(s.tiles, T::kGroups);
      clusters += clusters_of(s, work.cluster);
    }
    return Plan{work,        tile, T::kRows, T::kThreads, T::kBytes,
                T::kStages, clusters * work.cluster * work.token_tiles};
  });
}

// Sections: the logits, whose weights may be float32, the latent rows, the shared expert's activations.
inline Plan front_plan(int64_t tokens, int64_t width, int64_t experts, int64_t latent, int64_t inner, bool wide_router,
                       bool invariant) {
  const int32_t steps = ceil_div(width, 64);
  return plan(tokens,
              {{{ceil_div(experts, kRows), wide_router ? ceil_div(width, 32) : steps, 1},
                {ceil_div(latent, kRows), steps, 1},
                {ceil_div(inner, kRows), steps, 1}},
               1, 1},
              invariant);
}

// One section; its steps are those over the latent width, 0 without a projection, then those of the shared expert.
inline Plan tail_plan(int64_t tokens, int64_t width, int64_t latent, int64_t inner, bool invariant) {
  return plan(tokens, {{{ceil_div(width, kRows), ceil_div(latent, 64) + ceil_div(inner, 64), 1}, {}, {}}, 1, 1},
              invariant);
}

}  // namespace n3::latent_moe::sm90
