// A block of slots: their dx and dweights, and what the gradients of the weights need of them.
//
// A weight is read row by row where it is the left operand (h) and kGroup columns at a time where it is the right one
// (g, dx), and widened on the way; what was read then serves all slots of the block, while the next is asked for.
#pragma once
#include <algorithm>

#include "experts_bwd_layout_lanes.h"

namespace n3::moe_bwd {
namespace {

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

// ---- the block

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

}  // namespace
}  // namespace n3::moe_bwd
