// Memory of the experts' backward; compiled once per instruction set by a file that defines N3_LANES.
//
// Every product is a loop over register tiles (tiles.h) with both operands in one of two layouts, so that a tile reads
// memory in order and all distances in it are constants:
//   Panels  the right operand: panels of kPanel columns, each with its rows one behind the other
//   Strips  the left operand or its transpose: strips of kStrip columns, each with its rows one behind the other
#pragma once
#include <algorithm>

#include "../common/tiles.h"
#include "experts_bwd_kernels.h"

namespace n3::moe_bwd {
namespace {

// A multiple of a tile's rows and of whole panels; an odd number of cache lines, so that rows do not share one set.
constexpr int64_t kStrip = kLanes == 16 ? 208 : 240;
constexpr int64_t kPartTiles = kStrip / kTileRows / (kLanes == 16 ? 2 : 5);
constexpr int64_t kPartRows = kPartTiles * kTileRows;  // of a weight's gradient, in one item
constexpr int64_t kGroup = 64;                         // columns of a weight that are packed together
constexpr int64_t kChains = 16;                        // of dweights
static_assert(kStrip % kTileRows == 0 && kStrip % kChains == 0 && kStrip % kPartRows == 0);

constexpr int64_t parts_of(int64_t n, int64_t part) { return (n + part - 1) / part; }

// Rows of memory for a block's slots, as rows of tiles and as columns of vectors.
constexpr int64_t whole_slots(int64_t slots) { return std::max(whole_tiles(slots), whole_vectors(slots)); }

// Hands out memory piece by piece; without memory it only counts.
struct Arena {
  float* memory;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* piece = memory ? memory + used : nullptr;
    used += floats;
    return piece;
  }
};

struct Panels {
  float* p;
  int64_t rows;

  static int64_t floats(int64_t rows, int64_t cols) { return parts_of(cols, kPanel) * rows * kPanel; }
  float* at(int64_t col) const { return p + col / kPanel * rows * kPanel; }  // col a multiple of kPanel
};

struct Strips {
  float* p;
  int64_t rows;

  static int64_t floats(int64_t rows, int64_t cols) { return parts_of(cols, kStrip) * rows * kStrip; }
  float* strip(int64_t i) const { return p + i * rows * kStrip; }
  // Of a row, from this column to the end of its strip.
  float* at(int64_t row, int64_t col) const { return strip(col / kStrip) + row * kStrip + col % kStrip; }
};

// What a block of slots keeps for the gradients of the weights.
struct Kept {
  Panels x, a{};   // x: [slots, width]; a = act(h), with a strip's panels together: [slots, kStrip] for each strip
  Strips wdy{};    // w dy: [slots, width]
  Strips dh[2]{};  // [slots, inner]: the gate's, or all, and the others

  int64_t floats;

  Kept(const Problem& p, int64_t slots, float* memory) {
    const int64_t rows = whole_slots(slots);
    Arena arena{memory};
    x = {arena.take(Panels::floats(slots, p.width)), slots};
    for (int64_t half = 0; half < p.halves; ++half) dh[half] = {arena.take(Strips::floats(rows, p.inner)), rows};
    if (p.down) {
      a = {arena.take(parts_of(p.inner, kStrip) * Panels::floats(slots, kStrip)), slots};
      wdy = {arena.take(Strips::floats(rows, p.width)), rows};
    }
    floats = arena.used;
  }

  float* a_panel(int64_t strip, int64_t col) const {
    return Panels{a.p + strip * Panels::floats(a.rows, kStrip), a.rows}.at(col);
  }
};

// ---- rows of tensors

template <typename T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

template <typename T>
void widen(const T* from, int64_t n, const Strips& to, int64_t row) {
  for (int64_t i = 0; i < n; i += kStrip) widen(from + i, std::min(kStrip, n - i), to.at(row, i));
}

// `rows` rows of up to kPanel columns, zeros behind them.
template <typename T>
void pack_panel(const T* from, int64_t ld, int64_t rows, int64_t cols, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += ld, to += kPanel) {
    if (cols >= kPanel) {
      for (int c = 0; c < kTileVectors; ++c) store(to + c * kLanes, load(from + c * kLanes));
    } else {
      for (int c = 0; c < kTileVectors; ++c) {
        const int64_t left = std::clamp<int64_t>(cols - c * kLanes, 0, kLanes);
        store(to + c * kLanes, load_part(from + c * kLanes, left));
      }
    }
  }
}

// The first `cols` elements of V vectors.
template <typename T, int V>
N3_LANE_FN void store_row(T* to, const F32 (&v)[V], int64_t cols) {
  for (int c = 0; c < V; ++c) {
    if (cols >= (c + 1) * kLanes) {
      store(to + c * kLanes, v[c]);
    } else if (cols > c * kLanes) {
      store_part(to + c * kLanes, v[c], cols - c * kLanes);
    }
  }
}

template <typename T, int V>
N3_LANE_FN void store_tile(T* to, int64_t ld, const Tile<V>& tile, int64_t rows, int64_t cols) {
  if (rows >= kTileRows && cols >= V * kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < V; ++c) store(to + r * ld + c * kLanes, tile.v[r][c]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    if (r < rows) store_row(to + r * ld, tile.v[r], cols);
  }
}

// Rows of memory to ask for while tiles are at work: each of `tiles` tiles of so many terms as there are rows asks for
// its share, a few rows at a time, since only so many requests can be under way.
class Ahead {
 public:
  template <typename T>
  Ahead(const T* p, int64_t step, int64_t cols, int64_t rows, int64_t tiles)
      : p_(reinterpret_cast<const char*>(p)), step_(step * int64_t(sizeof(T))), bytes_(cols * int64_t(sizeof(T))),
        left_(rows), burst_((kTerms + tiles - 1) / tiles) {}

  static constexpr int64_t kTerms = 16;  // between two bursts of requests

  N3_LANE_FN void ask() {
    const int64_t n = std::min(burst_, left_);
    left_ -= n;
    for (int64_t i = 0; i < n; ++i, p_ += step_) {
      for (int64_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(p_ + byte, 0, 2);
    }
  }

 private:
  const char* p_;
  int64_t step_, bytes_, left_, burst_;
};

// tile += rows of a, `cols` of them, times b, which has so many rows.
template <int V>
N3_LANE_FN void add_rows(Tile<V>& tile, const Strips& a, int64_t row, int64_t cols, const float* b, Ahead& ahead) {
  for (int64_t k = 0; k < cols; k += kStrip) {
    const Rows<kStrip> strip{a.at(row, k)};
    const int64_t n = std::min(kStrip, cols - k);
    for (int64_t i = 0; i < n; i += Ahead::kTerms) {
      ahead.ask();
      tile.add(strip, b + k * kPanel, kPanel, i, std::min(i + Ahead::kTerms, n));
    }
  }
}

}  // namespace
}  // namespace n3::moe_bwd
