// How moe_experts runs on sm_90: tiles, ranges of the inner size, shared memory, who does which item. Pure host
// arithmetic and, where marked N3_HD, the very functions that the kernel calls.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../common/numerics.h"

namespace n3::moe_experts::sm90 {

// kWidth: the experts' input and output size, rounded up to what a template was made for; what lies beyond the
// operands' is zero. kTokens: of one expert, together. Two warpgroups hold the outputs, [kWidth, kTokens] in float32,
// in their registers: kTiles products' results of 64 rows each.
template <int kWidth_, int kTokens_>
struct Tile {
  static constexpr int kWidth = kWidth_, kTokens = kTokens_;
  static constexpr int kTiles = kWidth / 128;
  static_assert(kWidth % 128 == 0 && kTokens % 8 == 0);
};
using Tile256 = Tile<256, 32>;
using Tile1024 = Tile<1024, 32>;  // Nemotron 3 Super
using Tile2048 = Tile<2048, 16>;  // Ultra
using Tile2688 = Tile<2688, 16>;  // Nano
using Tile3584 = Tile<3584, 8>;

enum class Kernel { kTile256, kTile1024, kTile2048, kTile2688, kTile3584 };

constexpr int64_t kMostWidth = 3584;

inline Kernel kernel_for(int64_t width) {
  return width <= 256    ? Kernel::kTile256
         : width <= 1024 ? Kernel::kTile1024
         : width <= 2048 ? Kernel::kTile2048
         : width <= 2688 ? Kernel::kTile2688
                         : Kernel::kTile3584;
}

// Calls f with a null pointer of the template's type.
template <typename F>
auto with_tile(Kernel kernel, F f) {
  switch (kernel) {
    case Kernel::kTile256: return f(static_cast<Tile256*>(nullptr));
    case Kernel::kTile1024: return f(static_cast<Tile1024*>(nullptr));
    case Kernel::kTile2048: return f(static_cast<Tile2048*>(nullptr));
    case Kernel::kTile2688: return f(static_cast<Tile2688*>(nullptr));
    default: return f(static_cast<Tile3584*>(nullptr));
  }
}

constexpr int kThreads = 384;        // two warpgroups that compute, one that loads
constexpr int kChunk = 64;           // of the inner size: rows of W_up, columns of W_down
constexpr int kMostExperts = 1024;   // whose tiles are counted in shared memory
constexpr int kMostSlots = 64;       // per expert, on average: beyond, the tensor cores and not memory bound the time
constexpr int kCombineColumns = 128, kCombineWarps = 8, kCombineSlots = 32;  // of a block of combine_kernel

// ---------------------------------------------------------------- shared memory

constexpr int kSharedLimit = 232448;  // bytes a block may have on sm_90: 227 KiB

// Byte offsets from a start that is a multiple of 1024, the length of the swizzle pattern; and so are the tiles that
// the tensor cores read. Operand b, the tokens, has rows of 64 elements: 128 bytes. A stage holds a unit of weights.
template <typename Tile, int kStage_, int kMostStages_>
struct Ring {
  static constexpr int kStage = kStage_, kMostStages = kMostStages_;
  static constexpr int kBlock = Tile::kTokens * 128;  // 64 elements of each token
  static constexpr int kInputs = (Tile::kWidth / 64) * kBlock;
  static constexpr int kHidden = 2 * 2 * kBlock;      // twice, of two chunks of the inner size
  static constexpr int kBefore = 4 * (kMostExperts + 4);
  static constexpr int kTotals = 4 * (kThreads / 32);
  static constexpr int kList = 4 * (Tile::kTokens + 8);  // an item: its slots, and some facts
  static constexpr int kLists = 3;                       // read to the end of an item, written two items ahead
  static constexpr int kMeeting = 4 * (32 + 4);          // tokens that are complete
  static constexpr int kBarriers = 8 * (2 * kMostStages + 2);
  static constexpr int kRest = kInputs + kHidden + kBefore + kTotals + kLists * kList + kMeeting + kBarriers;
  static constexpr int kFit = (kSharedLimit - kRest) / kStage;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static_assert(kStages * kStage >= 80 * 1024, "too little under way to keep the memory busy");
  static_assert(kStage % 1024 == 0 && kBlock % 1024 == 0 && kBefore % 16 == 0 && kTotals % 16 == 0 && kList % 16 == 0);

  static constexpr int kInputsAt = kStages * kStage;
  static constexpr int kHiddenAt = kInputsAt + kInputs;
  static constexpr int kBeforeAt = kHiddenAt + kHidden;
  static constexpr int kTotalsAt = kBeforeAt + kBefore;
  static constexpr int kListsAt = kTotalsAt + kTotals;
  static constexpr int kMeetingAt = kListsAt + kLists * kList;
  static constexpr int kBarriersAt = kMeetingAt + kMeeting;
  static constexpr int kBytes = kBarriersAt + kBarriers;
  static_assert(kBytes <= kSharedLimit && kBarriersAt % 8 == 0);

  N3_HD static int stage_at(int stage) { return stage * kStage; }
  N3_HD static int inputs_at(int block) { return kInputsAt + block * kBlock; }
  N3_HD static int hidden_at(int slot, int block) { return kHiddenAt + (2 * slot + block) * kBlock; }
  N3_HD static int list_at(int which) { return kListsAt + which * kList; }
};

// Dense weights: 128 rows of 64 elements, the half of one warpgroup after that of the other.
constexpr int kHalf = 64 * 128;
template <typename Tile>
using DenseRing = Ring<Tile, 2 * kHalf, 12>;

// Rows of 128 bytes: bits 4..6 of an offset are exchanged as the copy engine and the tensor cores do it, so that eight
// rows' 16 bytes of one column lie in different banks. Its own inverse.
N3_HD int swizzled(int offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// ---------------------------------------------------------------- work

// The inner size in ranges of whole chunks, as even as can be: a function of the two sizes alone, since the sums of a
// slot are grouped by it. One token of Super has 22 experts: 22 x 6 = 132 items, one per multiprocessor of an H100.
struct Range {
  int32_t begin, end;  // chunks
};

N3_HD int32_t chunks_of(int64_t inner) { return int32_t((inner + kChunk - 1) / kChunk); }

N3_HD int32_t ranges_of(int64_t width, int64_t inner) {
  const int32_t most = width > 2048 ? 10 : 6, chunks = chunks_of(inner);
  return chunks < most ? chunks : most;
}

N3_HD Range range_at(int32_t chunks, int32_t ranges, int32_t r) {
  return {chunks * r / ranges, chunks * (r + 1) / ranges};  // chunks of 64 and at most 10 ranges: below 2^31
}

// An item is a tile of an expert's tokens and one range; or all ranges, where a row for each would take more than
// kMostRows bytes: then the second range is added to the first, the third to the sum, which is how separate
// rows are added. The bits are the same.
struct Work {
  int32_t experts, chunks, ranges;
  int32_t split;  // an item has one range
};

constexpr int64_t kMostRows = int64_t(64) << 20;

N3_HD int32_t rows_per_slot(const Work& w) { return w.split ? w.ranges : 1; }

N3_HD int32_t tiles_in(int32_t slots, int32_t tokens) { return slots > 0 ? (slots - 1) / tokens + 1 : 0; }

N3_HD int32_t tiles_of(const int32_t* offsets, int32_t expert, int32_t tokens) {
  return tiles_in(offsets[expert + 1] - offsets[expert], tokens);
}

// `before[e]`: tiles of the experts before e, for e up to the number of experts. Items of an expert are neighbours, and
// among those the tiles of one range: their weights come from the L2 cache for all but the first.
N3_HD int32_t items_of(const Work& w, const int32_t* before) { return before[w.experts] * rows_per_slot(w); }

struct Place {
  int32_t expert, tile;              // the tile among the expert's
  int32_t first_range, last_range;   // one behind the last
};

N3_HD Place place_at(const Work& w, const int32_t* before, int32_t index) {
  const int32_t parts = rows_per_slot(w), tile = index / parts;
  int32_t low = 0, high = w.experts;  // before[low] <= tile < before[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (before[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int32_t tiles = before[low + 1] - before[low], local = index - before[low] * parts, part = local / tiles;
  return {low, local % tiles, w.split ? part : 0, w.split ? part + 1 : w.ranges};
}

// The same where sorted slots are at hand.
struct Item {
  int32_t expert;
  int32_t first, count;              // places in the sorted slots
  int32_t first_range, last_range;   // one behind the last
};

N3_HD Item item_at(const Work& w, const int32_t* before, const int32_t* offsets, int32_t index, int32_t tokens) {
  const Place at = place_at(w, before, index);
  const int32_t first = offsets[at.expert] + at.tile * tokens, left = offsets[at.expert + 1] - first;
  return {at.expert, first, left < tokens ? left : tokens, at.first_range, at.last_range};
}

struct Plan {
  Kernel kernel;
  Work work;
  int64_t blocks;
  int64_t rows;      // of `width` floats, that the items write
  int64_t counters;  // of the tokens, then of the tiles
  int tokens, shared, stages;
};

// Launches are of as many tokens as have kMostSlots slots per expert, and at least one: batches beyond are cut.
inline int64_t tokens_of_a_launch(int64_t top_k, int64_t experts) {
  const int64_t most = kMostSlots * experts / top_k;
  return most > 0 ? most : 1;
}

// RingOf: the shared memory of the weights' format.
template <template <typename> typename RingOf>
Plan plan(Kernel kernel, int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t inner,
          int64_t multiprocessors) {
  return with_tile(kernel, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t slots = tokens * top_k;
    Work w{};
    w.experts = int32_t(experts), w.chunks = chunks_of(inner), w.ranges = ranges_of(width, inner);
    w.split = slots * w.ranges * width * 4 <= kMostRows;
    // How many tiles there are is known on the device alone; every expert may have one that is not full.
    const int64_t tiles = slots < experts + slots / T::kTokens ? slots : experts + slots / T::kTokens;
    const int64_t items = tiles * rows_per_slot(w), shared_tiles = rows_per_slot(w) > 1 ? tiles : 0;
    return Plan{kernel, w, items < multiprocessors ? items : multiprocessors, slots * rows_per_slot(w),
                tokens + shared_tiles, T::kTokens, RingOf<T>::kBytes, RingOf<T>::kStages};
  });
}

}  // namespace n3::moe_experts::sm90
