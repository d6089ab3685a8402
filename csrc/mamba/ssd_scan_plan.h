// How ssd_scan runs on sm_90: tiles, shared memory, who does which sequence and head. Pure host arithmetic and, where
// marked N3_HD, the very functions that the kernel calls.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../common/numerics.h"
#include "ssd_scan_decay.h"

namespace n3::ssd_scan::sm90 {

// A tile is a head, or kP of its channels: rows of the state do not mix. A block works on kWarpgroups tiles of one
// group at a time, which share its B and C. kN: dimensions of the state, rounded up to what a template was made for;
// what lies beyond the operands' is zero.
template <int kN_, int kP_, int kWarpgroups_>
struct Tile {
  static constexpr int kN = kN_, kP = kP_, kWarpgroups = kWarpgroups_;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kSubtiles = (kN + 63) / 64;  // of 64 dimensions: what a 128-byte row of B or C holds
  // Channels in a row of x, of the 16-bit state and of the weighted x: a power of two that divides kP.
  static constexpr int kColumns = kP % 64 == 0 ? 64 : 16;
  static constexpr int kRowBytes = 2 * kColumns;
};
using Tile64 = Tile<64, 64, 2>;
using Tile96 = Tile<96, 64, 2>;  // Nemotron-Labs-3-Puzzle
using Tile128 = Tile<128, 64, 2>;
using Tile128x80 = Tile<128, 80, 2>;  // Nemotron-3-Nano-4B, -Nano-9B-v2
using Tile256 = Tile<256, 64, 1>;     // one tile: two have no room for a second stage

enum class Kernel { kTile64, kTile96, kTile128, kTile128x80, kTile256 };

// The template for a problem: the fewest padded channels, then the fewest padded dimensions.
inline Kernel kernel_for(int64_t head_dim, int64_t d_state) {
  if (d_state > 128) return Kernel::kTile256;
  if (head_dim > 64 && head_dim <= 80) return Kernel::kTile128x80;
  return d_state <= 64 ? Kernel::kTile64 : d_state <= 96 ? Kernel::kTile96 : Kernel::kTile128;
}

// Calls f with a null pointer of the template's type.
template <typename F>
auto with_tile(Kernel kernel, F f) {
  switch (kernel) {
    case Kernel::kTile64: return f(static_cast<Tile64*>(nullptr));
    case Kernel::kTile96: return f(static_cast<Tile96*>(nullptr));
    case Kernel::kTile128: return f(static_cast<Tile128*>(nullptr));
    case Kernel::kTile128x80: return f(static_cast<Tile128x80*>(nullptr));
    default: return f(static_cast<Tile256*>(nullptr));
  }
}

// ---------------------------------------------------------------- shared memory

// Per tile and stage, made by a helper warp from dt.
struct Decays {
  float a[kTokens];      // sum of log2 decays up to and including a token
  float dt[kTokens];     // after bias, softplus and clamp; 0 behind the end of the sequence
  float start[kTokens];  // exp2(a): from the state that enters the chunk
  float row[kTokens], column[kColumnFactors];
  float end[kTokens];    // end_factor for the last token of the chunk
  float whole;           // exp2 of the last a
  float unused[3];       // to a multiple of 16 bytes
};

constexpr int kSharedLimit = 232448;  // bytes a block may have on sm_90: 227 KiB
constexpr int kMostStages = 4;

// Byte offsets from a start that is a multiple of 1024, the length of the longest swizzle pattern; and so are the tiles
// that the tensor cores read.
template <typename Tile>
struct Shared {
  static constexpr int kB = Tile::kSubtiles * kTokens * 128;  // of B, and of C
  static constexpr int kX = kTokens * 2 * Tile::kP;           // of x of one tile, and of the weighted x
  static constexpr int kState = Tile::kN * 2 * Tile::kP;      // of the 16-bit state of one tile
  static constexpr int kOperands = 2 * kB + Tile::kWarpgroups * kX;  // of one stage
  static constexpr int kDecays = Tile::kWarpgroups * int(sizeof(Decays));
  static constexpr int kSkip = Tile::kWarpgroups * 4 * Tile::kP;  // D of a tile's channels, float32
  static constexpr int kBarriers = 8 * 3 * kMostStages;
  static constexpr int kFixed = Tile::kWarpgroups * (kState + kX) + kSkip + kBarriers;
  static constexpr int kFit = (kSharedLimit - kFixed) / (kOperands + kDecays);
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static_assert(kStages >= 2, "the loads of a chunk would not overlap with the work on another");
  static_assert(kB % 1024 == 0 && kX % 1024 == 0 && kState % 1024 == 0 && sizeof(Decays) % 16 == 0);

  static constexpr int kDecaysAt = kStages * kOperands + Tile::kWarpgroups * (kState + kX);
  static constexpr int kSkipAt = kDecaysAt + kStages * kDecays;
  static constexpr int kBarriersAt = kSkipAt + kSkip;
  static constexpr int kBytes = kBarriersAt + kBarriers;
  static_assert(kBytes <= kSharedLimit && kBarriersAt % 8 == 0);

  // States pass through here between registers and memory, 16 dimensions of each of a warpgroup's 4 warps at a time, in
  // the place of the 16-bit state and the weighted x.
  static constexpr int kScratch = 16 * Tile::kP * 4;
  static_assert(4 * kScratch <= kState + kX);

  N3_HD static int c_at(int stage) { return stage * kOperands; }
  N3_HD static int b_at(int stage) { return stage * kOperands + kB; }
  N3_HD static int x_at(int stage, int tile) { return stage * kOperands + 2 * kB + tile * kX; }
  N3_HD static int state_at(int tile) { return kStages * kOperands + tile * (kState + kX); }
  N3_HD static int weighted_at(int tile) { return state_at(tile) + kState; }
};

// Rows of 128 or 32 bytes: bits 4.. of an offset are exchanged as the copy engine and the tensor cores do it, so that
// eight rows' 16 bytes of one column lie in different banks. Its own inverse.
template <int kRowBytes>
N3_HD int swizzled(int offset) {
  static_assert(kRowBytes == 128 || kRowBytes == 32);
  return offset ^ ((offset >> 7 & (kRowBytes / 16 - 1)) << 4);
}

// Byte offset of an element of 16 bits in a tile of `rows` rows: blocks of kColumns columns, one behind the other.
template <int kColumns>
N3_HD int element_at(int row, int col, int rows) {
  return swizzled<2 * kColumns>((col / kColumns * rows + row) * 2 * kColumns + col % kColumns * 2);
}

// The same for row `eight + r` and column `8 j + c`, r and c < 8 and `eight` a multiple of 8, from what element_at()
// says of (r, c): one exclusive or and a constant.
template <int kColumns>
N3_HD int element_from(int corner, int eight, int j, int rows) {
  return (8 * j / kColumns * rows + eight) * 2 * kColumns + (corner ^ (8 * j % kColumns * 2));
}

// ---------------------------------------------------------------- work

// Items are (sequence, group, up to `per_block` tiles of the group), those of one sequence side by side. Block b does
// items b, b + blocks, ..., chunk by chunk. Packed problems have one sequence more: the tokens behind the last one.
struct Work {
  int32_t groups, tiles_per_head, tiles_per_group, per_block, blocks_per_group;
  int32_t items;
};

struct Item {
  int32_t sequence, group, first_tile;  // the tile's number in its group
};

N3_HD Item item_at(const Work& w, int32_t index) {
  const int32_t per_sequence = w.groups * w.blocks_per_group, rest = index % per_sequence;
  return {index / per_sequence, rest / w.blocks_per_group, rest % w.blocks_per_group * w.per_block};
}

struct TileAt {
  bool exists;
  int32_t head, channel;  // the first
};

// Tile number `which` of an item, of kP channels.
N3_HD TileAt tile_at(const Work& w, const Item& item, int which, int kP) {
  const int32_t tile = item.first_tile + which;
  const bool exists = which < w.per_block && tile < w.tiles_per_group;
  const int32_t heads_per_group = w.tiles_per_group / w.tiles_per_head;
  return {exists, item.group * heads_per_group + tile / w.tiles_per_head, tile % w.tiles_per_head * kP};
}

constexpr int32_t kMostItems = 1 << 30;  // more of them, and the launcher refuses

struct Plan {
  Kernel kernel;
  Work work;
  int64_t blocks;
  int threads, shared, stages;
};

// Two tiles per block read B and C once for both; where there are not enough for every multiprocessor, one. The bits do
// not depend on it, nor on the number of multiprocessors.
inline Plan plan(int64_t sequences, bool packed, int64_t heads, int64_t groups, int64_t head_dim, int64_t d_state,
                 int64_t multiprocessors) {
  const Kernel kernel = kernel_for(head_dim, d_state);
  return with_tile(kernel, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Work w{};
    w.groups = int32_t(groups);
    w.tiles_per_head = int32_t((head_dim + T::kP - 1) / T::kP);
    w.tiles_per_group = int32_t(heads / groups) * w.tiles_per_head;
    const int64_t all = sequences * groups * w.tiles_per_group;
    w.per_block = all > multiprocessors ? T::kWarpgroups : 1;
    w.blocks_per_group = (w.tiles_per_group + w.per_block - 1) / w.per_block;
    const int64_t items = (sequences + packed) * groups * w.blocks_per_group;
    w.items = int32_t(items < kMostItems ? items : kMostItems + 1);
    const int64_t blocks = items < multiprocessors ? items : multiprocessors;
    return Plan{kernel, w, blocks, T::kThreads, Shared<T>::kBytes, Shared<T>::kStages};
  });
}

}  // namespace n3::ssd_scan::sm90
