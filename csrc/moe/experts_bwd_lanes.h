// The gradients of a block of slots and of a part of a group's weights, compiled once per instruction set by a file
// that defines N3_LANES; experts_bwd_kernels.h states the arithmetic.
//
// Every product is a loop over register tiles (tiles.h) with both operands in one of two layouts, so that a tile reads
// memory in order and all distances in it are constants:
//   Panels  the right operand: panels of kPanel columns, each with its rows one behind the other
//   Strips  the left operand or its transpose: strips of kStrip columns, each with its rows one behind the other
// A weight is read row by row where it is the left operand (h) and kGroup columns at a time where it is the right one
// (g, dx), and widened on the way; what was read then serves all slots of the block, while the next is asked for.
#pragma once
#include <algorithm>
#include <vector>

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

// ---- activations

// The standard normal's distribution and density, e^(-x^2/2) times a polynomial in 1 / (1 + 0.35 |x|): a weighted least
// squares fit of relative error 4e-8.
N3_LANE_FN void normal(F32 x, F32& below, F32& density) {
  const F32 size = x < 0.f ? -x : x;
  const F32 t = 1.f / fma(size, splat(0.35f), splat(1.f));
  F32 p = splat(-0.029145958963155413f);
  p = fma(p, t, splat(0.1439718330057556f));
  p = fma(p, t, splat(-0.25571452351573115f));
  p = fma(p, t, splat(0.15917445473994588f));
  p = fma(p, t, splat(-0.023110027690262956f));
  p = fma(p, t, splat(0.10550808077558811f));
  p = fma(p, t, splat(0.11983284955665392f));
  p = fma(p, t, splat(0.1398618719660257f));
  p = fma(p, t, splat(0.1396214041788046f));
  const F32 e = exp(x * x * -0.5f), tail = p * t * e;
  below = x < 0.f ? tail : 1.f - tail;
  density = e * 0.398942280401432678f;
}

// What the gradient takes of an activation at one vector: a = act(h), and dh from da.
template <Activation kActivation>
struct Point {
  F32 a, gate_slope{}, up_slope{};  // without a gate gate_slope is 2 max(h, 0) or 1

  N3_LANE_FN Point(F32 gate, F32 up) {
    if constexpr (kActivation == kNone) {
      a = gate;
    } else if constexpr (kActivation == kRelu2) {
      const F32 positive = gate < 0.f ? F32{} : gate;  // NaN stays
      a = positive * positive;
      gate_slope = positive + positive;
    } else if constexpr (kActivation == kSilu) {
      const F32 s = sigmoid(gate);
      up_slope = gate * s;
      a = up_slope * up;
      gate_slope = s * fma(gate, 1.f - s, splat(1.f)) * up;
    } else {
      F32 below, density;
      normal(gate, below, density);
      up_slope = gate * below;
      a = up_slope * up;
      gate_slope = fma(gate, density, below) * up;
    }
  }

  N3_LANE_FN F32 gate_gradient(F32 da) const {
    if constexpr (kActivation == kNone) return da;
    // A gradient that is not finite does not pass a closed relu.
    if constexpr (kActivation == kRelu2) return gate_slope == 0.f ? F32{} : gate_slope * da;
    return gate_slope * da;
  }
};

// ---- a block of slots

// What a block keeps for the gradients of the weights.
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

int64_t block_floats(const Problem& p, int64_t slots) { return Kept(p, slots, nullptr).floats; }

template <typename T>
class Slots {
 public:
  Slots(const Problem& p, int64_t group, const Block& block, float* scratch)
      : p_(p), block_(block), n_(block.count), rows_(whole_slots(n_)), kept_(p, n_, block.memory) {
    Arena arena{scratch};
    const auto take = [&](int64_t floats) { return arena.take(floats); };
    ldx_ = line_rows(p.width);
    x_ = take(kPanel * ldx_);
    x_t_ = {take(Panels::floats(p.width, n_)), p.width};
    dy_ = {take(Strips::floats(rows_, grad_cols())), rows_};
    w_rows_ = {take(Strips::floats(kTileRows, p.width)), kTileRows};
    h_t_ = take(kStrip * Panels::floats(1, n_));
    panels_ = {take(std::max(p.width, p.halves * p.inner) * kGroup), 0};
    g_ = take(rows_ * kPanel);
    chains_ = take(n_ * kChains);
    scratch_floats_ = arena.used;
    up_ = static_cast<const T*>(p.up) + group * p.halves * p.inner * p.width;
    down_ = static_cast<const T*>(p.down) + (p.down ? group * p.width * p.inner : 0);
  }

  static int64_t scratch_floats(const Problem& p, int64_t slots) {
    return Slots(p, 0, {nullptr, slots, nullptr}, nullptr).scratch_floats_;
  }

  void run() {
    read_x();
    read_grad();
    const bool needs_h = p_.activation != kNone || p_.dweights;
    for (int64_t half = 0; half < p_.halves && needs_h; ++half) {
      for (int64_t col = 0; col < p_.inner; col += kStrip) hidden(half, col, std::min(kStrip, p_.inner - col));
    }
    std::fill_n(chains_, n_ * kChains, 0.f);
    switch (p_.activation) {
      case kNone: through_activation<kNone>(); break;
      case kRelu2: through_activation<kRelu2>(); break;
      case kSilu: through_activation<kSilu>(); break;
      case kGelu: through_activation<kGelu>(); break;
    }
    if (p_.dweights) write_dweights();
    input_gradient();
  }

 private:
  static int64_t line_rows(int64_t cols) { return (parts_of(cols, 16) | 1) * 16; }  // an odd number of cache lines

  int64_t grad_cols() const { return p_.down ? p_.width : p_.inner; }
  float weight(int64_t slot) const { return p_.weights ? p_.weights[block_.slots[slot].at] : 1.f; }

  // x as panels of its columns, for dW_up, and as panels of slots, for h.
  void read_x() {
    for (int64_t first = 0; first < n_; first += kPanel) {
      const int64_t count = std::min(kPanel, n_ - first);
      for (int64_t i = 0; i < count; ++i) {
        float* row = x_ + i * ldx_;
        widen(static_cast<const T*>(p_.x) + block_.slots[first + i].x * p_.width, p_.width, row);
        for (int64_t col = 0; col < p_.width; col += kPanel) {
          pack_panel(row + col, 0, 1, p_.width - col, kept_.x.at(col) + (first + i) * kPanel);
        }
      }
      transpose(x_, ldx_, count, p_.width, x_t_.at(first), kPanel);
    }
  }

  void read_grad() {
    for (int64_t i = 0; i < n_; ++i) {
      widen(static_cast<const T*>(p_.grad) + block_.slots[i].grad * grad_cols(), grad_cols(), dy_, i);
      if (!p_.down) continue;
      const F32 w = splat(weight(i));
      for (int64_t k = 0; k < p_.width; k += kLanes) store(kept_.wdy.at(i, k), load(dy_.at(i, k)) * w);
    }
  }

  // h of the columns col .. col + cols of a half, in the place of dh.
  void hidden(int64_t half, int64_t col, int64_t cols) {
    const int64_t ld = Panels::floats(1, n_);
    for (int64_t row = 0; row < cols; row += kTileRows) {
      for (int64_t r = 0; r < std::min<int64_t>(kTileRows, cols - row); ++r) {
        widen(up_ + (half * p_.inner + col + row + r) * p_.width, p_.width, w_rows_, r);
      }
      const T* next = up_ + (half * p_.inner + col + row + kTileRows) * p_.width;
      Ahead ahead(next, kTileRows, kTileRows, p_.width, parts_of(n_, kPanel));
      for_panels(n_, [&](auto vectors, int64_t slot) {
        Tile<vectors> tile;
        tile.zero();
        add_rows(tile, w_rows_, 0, p_.width, x_t_.at(slot), ahead);
        tile.store(h_t_ + row * ld + slot, ld);
      });
    }
    // Whole vectors: what lies behind the last slot and the last column has memory in both.
    transpose(h_t_, ld, (cols + kLanes - 1) / kLanes * kLanes, whole_vectors(n_), kept_.dh[half].at(0, col), kStrip);
  }

  template <Activation kActivation>
  void through_activation() {
    for (int64_t strip = 0; strip < p_.inner; strip += kStrip) {
      const int64_t end = std::min(kStrip, p_.inner - strip);
      if (!p_.down) {
        for_panels(end, [&](auto vectors, int64_t col) {
          epilogue<kActivation, vectors>(strip, col, dy_.at(0, strip) + col, kStrip);
        });
        continue;
      }
      for (int64_t first = 0; first < end; first += kGroup) {
        const int64_t cols = std::min(kGroup, end - first);
        Ahead ahead = pack(down_ + strip + first, p_.inner, p_.width, p_.inner - strip - first, cols);
        for_panels(cols, [&](auto vectors, int64_t col) {
          output_gradient<vectors>(panels_.at(col), ahead);
          epilogue<kActivation, vectors>(strip, first + col, g_, kPanel);
        });
      }
    }
  }

  // The first `cols` columns of a weight as panels; `left`: the columns it has. Returns what comes behind them, to be
  // asked for while these are at work.
  Ahead pack(const T* from, int64_t ld, int64_t rows, int64_t left, int64_t cols) {
    panels_.rows = rows;
    for (int64_t col = 0; col < cols; col += kPanel) pack_panel(from + col, ld, rows, left - col, panels_.at(col));
    return Ahead(from + kGroup, ld, kGroup, rows, parts_of(n_, kTileRows) * parts_of(cols, kPanel));
  }

  // g of the slots, for one panel of columns.
  template <int V>
  void output_gradient(const float* panel, Ahead& ahead) {
    for (int64_t row = 0; row < n_; row += kTileRows) {
      Tile<V> tile;
      tile.zero();
      add_rows(tile, dy_, row, p_.width, panel, ahead);
      tile.store(g_ + row * kPanel, kPanel);
    }
  }

  template <Activation kActivation, int V>
  void epilogue(int64_t strip, int64_t col, const float* g, int64_t ldg) {
    for (int64_t i = 0; i < n_; ++i) {
      float* gate = kept_.dh[0].at(i, strip) + col;
      float* up = p_.halves == 2 ? kept_.dh[1].at(i, strip) + col : nullptr;
      float* a = p_.down ? kept_.a_panel(strip / kStrip, col) + i * kPanel : nullptr;
      const F32 w = splat(weight(i));
      for (int v = 0; v < V; ++v) {
        const int64_t at = v * kLanes, left = p_.inner - strip - col - at;
        const auto read = [&](const float* p) { return left >= kLanes ? load(p + at) : load_part(p + at, left); };
        const F32 gv = read(g + i * ldg);
        float* chain = chains_ + i * kChains + (col + at) % kChains;
        if (kActivation == kNone && !p_.dweights) {
          store(gate + at, w * gv);
          continue;
        }
        const Point<kActivation> point(read(gate), up ? read(up) : F32{});
        const F32 da = w * gv;
        store(chain, fma(point.a, gv, load(chain)));
        if (a) store(a + at, point.a);
        store(gate + at, point.gate_gradient(da));
        if (up) store(up + at, point.up_slope * da);
      }
    }
  }

  void write_dweights() {
    for (int64_t i = 0; i < n_; ++i) {
      float total = 0;
      for (int64_t c = 0; c < kChains; ++c) total += chains_[i * kChains + c];
      p_.dweights[block_.slots[i].at] = total;
    }
  }

  void input_gradient() {
    const int64_t rows = p_.halves * p_.inner;
    static_assert(kGroup % kPanel == 0);
    for (int64_t first = 0; first < p_.width; first += kGroup) {
      const int64_t cols = std::min(kGroup, p_.width - first);
      Ahead ahead = pack(up_ + first, p_.width, rows, p_.width - first, cols);
      for_panels(cols, [&](auto vectors, int64_t col) {
        for (int64_t row = 0; row < n_; row += kTileRows) {
          Tile<vectors> tile;
          tile.zero();
          for (int64_t half = 0; half < p_.halves; ++half) {
            const float* panel = panels_.at(col) + half * p_.inner * kPanel;
            add_rows(tile, kept_.dh[half], row, p_.inner, panel, ahead);
          }
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) {
            if (row + r >= n_) continue;
            const int64_t at = block_.slots[row + r].at * p_.width + first + col;
            store_row(p_.dx + at, tile.v[r], cols - col);
          }
        }
      });
    }
  }

  const Problem& p_;
  const Block& block_;
  int64_t n_, rows_, ldx_;
  Kept kept_;
  float *x_, *h_t_, *g_, *chains_;
  Panels panels_;     // kGroup columns of a weight
  Panels x_t_;        // [width, slots]
  Strips dy_;         // [slots, width or inner]
  Strips w_rows_;     // kTileRows rows of W_up
  int64_t scratch_floats_;
  const T *up_, *down_;
};

template <typename T>
void slots(const Problem& p, int64_t group, const Block& block, float* scratch) {
  Slots<T>(p, group, block, scratch).run();
}

int64_t scratch_floats(const Problem& p, int64_t count) { return Slots<float>::scratch_floats(p, count); }

// ---- the gradients of the weights

// Rows begin .. begin + count of one half of dW_up or of dW_down.
struct Part {
  bool down;
  int64_t half, begin, count;
};

int64_t parts_of_inner(const Problem& p) { return parts_of(p.inner, kPartRows); }

int64_t weight_parts(const Problem& p) {
  return p.halves * parts_of_inner(p) + (p.down ? parts_of(p.width, kPartRows) : 0);
}

Part part_at(const Problem& p, int64_t index) {
  const int64_t of_inner = parts_of_inner(p);
  const bool down = index >= p.halves * of_inner;
  const int64_t half = down ? 0 : index / of_inner;
  const int64_t begin = (index - (down ? p.halves : half) * of_inner) * kPartRows;
  return {down, half, begin, std::min(kPartRows, (down ? p.width : p.inner) - begin)};
}

// Columns of a part's sums: enough for the panels of either weight's rows.
int64_t sum_cols(const Problem& p) {
  return std::max(Panels::floats(1, p.width), parts_of(p.inner, kStrip) * Panels::floats(1, kStrip));
}

int64_t sum_floats(const Problem& p) { return weight_parts(p) * kPartRows * sum_cols(p); }

template <typename T>
class Weights {
 public:
  Weights(const Problem& p, const WeightRows& rows) : p_(p), rows_(rows), part_(part_at(p, rows.part)) {
    cols_ = part_.down ? p.inner : p.width;
    T* first = static_cast<T*>(part_.down ? p.ddown : p.dup);
    const int64_t of_group = part_.down ? p.width : p.halves * p.inner;
    out_ = first + (rows.group * of_group + part_.half * p.inner + part_.begin) * cols_;
    sums_ = rows.sums ? rows.sums + rows.part * kPartRows * sum_cols(p) : nullptr;
    for (const Block& block : rows.blocks) {
      const Kept kept(p, block.count, block.memory);
      const Strips& a = part_.down ? kept.wdy : kept.dh[part_.half];
      operands_.push_back({a.at(0, part_.begin), kept, block.count});
    }
  }

  // One block's operands are small: rows outside, so that the output is written in order. Of many blocks a panel is
  // kept in the cache and serves all the rows.
  void run() {
    const int64_t together = rows_.blocks.size() > 1 ? kPartRows : kTileRows;
    for (int64_t row = 0; row < part_.count; row += together) {
      for (int64_t strip = 0; strip < cols_; strip += part_.down ? kStrip : cols_) {
        for_panels(part_.down ? std::min(kStrip, cols_ - strip) : cols_, [&](auto vectors, int64_t col) {
          for (int64_t r = row; r < std::min(row + together, part_.count); r += kTileRows) tile<vectors>(r, strip, col);
        });
      }
    }
  }

 private:
  template <int V>
  void tile(int64_t row, int64_t strip, int64_t col) {
    float* sums = sums_ + row * sum_cols(p_) + strip / kStrip * Panels::floats(1, kStrip) + col;
    if (rows_.end) {  // the rows below, for their stores
      const T* next = out_ + (row + kTileRows) * cols_ + strip + col;
      for (int r = 0; r < kTileRows; ++r) {
        for (size_t byte = 0; byte < V * kLanes * sizeof(T); byte += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(next + r * cols_) + byte, 1);
        }
      }
    }
    Tile<V> tile;
    if (rows_.begin) {
      tile.zero();
    } else {
      tile.load(sums, sum_cols(p_));
    }
    for (const auto& [a, kept, count] : operands_) {
      const float* b = part_.down ? kept.a_panel(strip / kStrip, col) : kept.x.at(col);
      tile.add(Columns{a + row, kStrip}, b, kPanel, 0, count);
    }
    if (rows_.end) {
      store_tile(out_ + row * cols_ + strip + col, cols_, tile, part_.count - row, cols_ - strip - col);
    } else {
      tile.store(sums, sum_cols(p_));
    }
  }

  struct Operands {
    const float* a;  // Columns of the part's first rows
    Kept kept;
    int64_t count;
  };

  const Problem& p_;
  const WeightRows& rows_;
  Part part_;
  std::vector<Operands> operands_;
  int64_t cols_;
  T* out_;
  float* sums_;
};

template <typename T>
void weights(const Problem& p, const WeightRows& rows) {
  Weights<T>(p, rows).run();
}

constexpr Kernels kKernels = {
    block_floats,
    scratch_floats,
    {slots<float>, slots<Half>, slots<BFloat16>},
    weight_parts,
    sum_floats,
    {weights<float>, weights<Half>, weights<BFloat16>},
};

}  // namespace
}  // namespace n3::moe_bwd
