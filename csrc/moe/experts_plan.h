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
constexpr int kMostStages = 12;

// Byte offsets from a start that is a multiple of 1024, the length of the swizzle pattern; and so are the tiles that
// the tensor cores read. All of them have rows of 64 elements: 128 bytes.
template <typename Tile>
struct Shared {
  static constexpr int kHalf = 64 * 128;               // 64 rows of weights: operand a of one warpgroup
  static constexpr int kStage = 2 * kHalf;             // 128 rows of W_up or W_down
  static constexpr int kBlock = Tile::kTokens * 128;   // 64 elements of each token: operand b
  static constexpr int kInputs = (Tile::kWidth / 64) * kBlock;
  static constexpr int kHidden = 2 * 2 * kBlock;       // twice, of one chunk per warpgroup
  static constexpr int kBefore = 4 * (kMostExperts + 4);
  static constexpr int kTotals = 4 * (kThreads / 32);
  static constexpr int kBarriers = 8 * (2 * kMostStages + 2);
  static constexpr int kFit = (kSharedLimit - kInputs - kHidden - kBefore - kTotals - kBarriers) / kStage;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static_assert(kStages >= 4, "too few loads under way to keep the memory busy");
  static_assert(kBlock % 1024 == 0 && kBefore % 16 == 0 && kTotals % 16 == 0);

  static constexpr int kInputsAt = kStages * kStage;
  static constexpr int kHiddenAt = kInputsAt + kInputs;
  static constexpr int kBeforeAt = kHiddenAt + kHidden;
  static constexpr int kTotalsAt = kBeforeAt + kBefore;
  static constexpr int kBarriersAt = kTotalsAt + kTotals;
  static constexpr int kBytes = kBarriersAt + kBarriers;
  static_assert(kBytes <= kSharedLimit && kBarriersAt % 8 == 0);

  N3_HD static int stage_at(int stage) { return stage * kStage; }
  N3_HD static int inputs_at(int block) { return kInputsAt + block * kBlock; }
  N3_HD static int hidden_at(int slot, int half) { return kHiddenAt + (2 * slot + half) * kBlock; }
};

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
// kMostRows bytes: then the second range is added to the first, the third to the sum, which is how combine_kernel adds
// separate rows. The bits are the same.
struct Work {
  int32_t experts, chunks, ranges;
  int32_t split;  // an item has one range
};

constexpr int64_t kMostRows = int64_t(64) << 20;

N3_HD int32_t rows_per_slot(const Work& w) { return w.split ? w.ranges : 1; }

struct Item {
  int32_t expert;
  int32_t first, count;              // places in the sorted slots
  int32_t first_range, last_range;   // one behind the last
};

N3_HD int32_t tiles_of(const int32_t* offsets, int32_t expert, int32_t tokens) {
  const int32_t count = offsets[expert + 1] - offsets[expert];
  return count > 0 ? (count - 1) / tokens + 1 : 0;
}

// `before[e]`: tiles of the experts before e, for e up to the number of experts. Items of an expert are neighbours, and
// among those the tiles of one range: their weights come from the L2 cache for all but the first.
N3_HD int32_t items_of(const Work& w, const int32_t* before) { return before[w.experts] * rows_per_slot(w); }

N3_HD Item item_at(const Work& w, const int32_t* before, const int32_t* offsets, int32_t index, int32_t tokens) {
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
  const int32_t tiles = before[low + 1] - before[low], local = index - before[low] * parts;
  const int32_t part = local / tiles, first = offsets[low] + local % tiles * tokens, left = offsets[low + 1] - first;
  return {low, first, left < tokens ? left : tokens, w.split ? part : 0, w.split ? part + 1 : w.ranges};
}

struct Plan {
  Kernel kernel;
  Work work;
  int64_t blocks, combine_blocks;
  int64_t rows;  // of `width` floats, that the items write
  int tokens, shared, stages;
};

inline Plan plan(int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t inner,
                 int64_t multiprocessors) {
  const Kernel kernel = kernel_for(width);
  return with_tile(kernel, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t slots = tokens * top_k;
    Work w{};
    w.experts = int32_t(experts), w.chunks = chunks_of(inner), w.ranges = ranges_of(width, inner);
    w.split = slots * w.ranges * width * 4 <= kMostRows;
    // How many tiles there are is known on the device alone; every expert may have one that is not full.
    const int64_t tiles = slots < experts + slots / T::kTokens ? slots : experts + slots / T::kTokens;
    const int64_t items = tiles * rows_per_slot(w);
    const int64_t columns = (width + kCombineColumns - 1) / kCombineColumns;
    return Plan{kernel,        w,          items < multiprocessors ? items : multiprocessors,
                tokens * columns, slots * rows_per_slot(w), T::kTokens, Shared<T>::kBytes, Shared<T>::kStages};
  });
}

}  // namespace n3::moe_experts::sm90
