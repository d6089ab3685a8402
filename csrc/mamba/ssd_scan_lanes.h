// The scan of one item, compiled once per instruction set; ssd_scan_kernels.h states the arithmetic. The state stays in
// scratch for all chunks, transposed: H^T [d_state, width] for each panel, so that it is the right-hand side of C H^T
// and the result of B^T (x w) without moving.
#pragma once
#include <cmath>

#include "ssd_scan_kernels.h"
#include "../common/tiles.h"

namespace n3::ssd_scan {
namespace {

constexpr int64_t kRows = whole_tiles(kChunk);
constexpr int64_t kSlack = 64;  // floats behind a matrix that its last tile may read

// A log decay below this counts as minus infinity: 1.6e-28 of a state or term is far below the rounding of what is added
// beside it, and products that come out subnormal take a hundred times as long (a whole scan three times).
constexpr float kLeastLog = -64.f;

N3_LANE_FN F32 decay(F32 log) { return log < kLeastLog ? F32{} : exp(log); }

// ---- strided memory

template <typename T>
void widen(const T* p, int64_t stride, int64_t n, float* out) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(p + i));
  }
  for (; i < n; ++i) out[i] = to_float(p[i * stride]);
}

template <typename T>
void narrow(const float* in, int64_t n, T* p, int64_t stride) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(p + i, load(in + i));
  }
  for (; i < n; ++i) p[i * stride] = from_float<T>(in[i]);
}

// n elements of an operand of any of the three dtypes, from `offset` on.
inline void widen(const Operand& o, int64_t offset, int64_t stride, int64_t n, float* out) {
  switch (o.dtype) {
    case ScalarType::Float: return widen(static_cast<const float*>(o.data) + offset, stride, n, out);
    case ScalarType::Half: return widen(static_cast<const Half*>(o.data) + offset, stride, n, out);
    default: return widen(static_cast<const BFloat16*>(o.data) + offset, stride, n, out);
  }
}

inline void narrow(const float* in, int64_t n, const Operand& o, int64_t offset, int64_t stride) {
  switch (o.dtype) {
    case ScalarType::Float: return narrow(in, n, static_cast<float*>(o.data) + offset, stride);
    case ScalarType::Half: return narrow(in, n, static_cast<Half*>(o.data) + offset, stride);
    default: return narrow(in, n, static_cast<BFloat16*>(o.data) + offset, stride);
  }
}

inline float scalar(const Operand& o, int64_t offset) {
  float v;
  widen(o, offset, 1, 1, &v);
  return v;
}

// ---- time steps and decays of a head in a chunk

struct alignas(64) Decays {
  float dt[kChunk];
  float high[kChunk], low[kChunk];  // the sums of A dt, as high + low
  float from_start[kRows];          // exp of them; zeros for the rows that complete a tile

  // n tokens of `dt`; those behind them do nothing.
  void fill(const Params& p, int64_t head, int64_t offset, int64_t n) {
    const F32 bias = splat(p.dt_bias.data ? scalar(p.dt_bias, head * p.dt_bias.strides[0]) : 0.f);
    const F32 least = splat(p.dt_min), most = splat(p.dt_max);
    std::fill_n(dt, kChunk, 0.f);
    widen(p.dt, offset, p.dt.strides[1], n, dt);
    for (int64_t i = 0; i < n; i += kLanes) {
      F32 v = load(dt + i);
      if (p.dt_bias.data) v += bias;
      if (p.dt_softplus) v = softplus(v);
      v = v < least ? least : v > most ? most : v;
      store(dt + i, v);
    }
    sum(double(scalar(p.A, head * p.A.strides[0])), n);
  }

  void sum(double A, int64_t n) {
    // In double, so that differences of sums keep their digits behind a large time step. A step at the bound forgets
    // everything, as any beyond it would; without it the digits would be lost behind 1e10. NaN passes.
    constexpr double kLargest = 1e5;
    double sum = 0;
    for (int64_t i = 0; i < kChunk; ++i) {
      if (i < n) {
        const double step = A * dt[i];
        sum += step < -kLargest ? -kLargest : step > kLargest ? kLargest : step;
      } else {
        dt[i] = 0.f;
      }
      high[i] = float(sum);
      low[i] = float(sum - high[i]);
    }
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const F32 e = decay(load(high + i));
      // Where e is neither 0 nor infinite, |low| < 2^-18 and exp(low) is 1 + low.
      store(from_start + i, e == 0.f || e == __builtin_inff() ? e : e * (load(low + i) + 1.f));
    }
    std::fill(from_start + n, from_start + kRows, 0.f);
  }

  // exp(a_i - a_j) for j and the lanes behind it; right for j <= i.
  N3_LANE_FN F32 between(int64_t i, int64_t j) const {
    return decay((high[i] - load(high + j)) + (low[i] - load(low + j)));
  }

  // out_j = dt_j exp(a_end - a_j) of the first n tokens.
  void to_end(int64_t n, float* out) const {
    for (int64_t j = 0; j < n; j += kLanes) store(out + j, load(dt + j) * between(n - 1, j));
  }
};

// ---- one item

template <typename T>
class Scan {
 public:
  Scan(const Params& p, const Item& item, float* scratch) : p_(p), item_(item) {
    const auto take = [&](int64_t floats) {
      float* block = scratch;
      scratch += floats;
      return block;
    };
    B_ = take(tokens_floats(p)), B_t_ = take(tokens_floats(p)), C_t_ = take(tokens_floats(p));
    scores_ = take(kRows * kChunk), M_ = take(kRows * kChunk);
    x_ = take(head_floats(p)), xw_ = take(head_floats(p)), y_ = take(head_floats(p));
    row_ = take(channel_floats(p)), D_ = take(channel_floats(p)), gate_ = take(channel_floats(p));
    kept_x_ = take(kRows * kPanel), kept_ = take(state_floats(p));
    state_rows_ = take(state_floats(p)), states_ = take(0);
    panels_ = (p.head_dim + kPanel - 1) / kPanel;
  }

  static int64_t scratch_floats(const Params& p, int64_t panels) {
    return 3 * tokens_floats(p) + 2 * kRows * kChunk + 3 * head_floats(p) + 3 * channel_floats(p) +
           kRows * kPanel + (panels + 2) * state_floats(p);
  }

  void run() {
    for (int64_t i = item_.begin; i < item_.end; ++i) read_state(i);
    for (start_ = 0; start_ < item_.length; start_ += kChunk) {
      n_ = std::min(kChunk, item_.length - start_);
      if (item_.stage) {
        const int64_t tiles = (whole_tiles(n_) + whole_tiles(p_.d_state)) / kTileRows;
        item_.stage->before(start_, n_, tiles * (item_.end - item_.begin));
      }
      share_group();
      for (int64_t i = item_.begin; i < item_.end; i = (i / panels_ + 1) * panels_) run_head(i / panels_);
      if (item_.stage) item_.stage->after(start_, n_);
    }
    for (int64_t i = item_.begin; i < item_.end; ++i) write_state(i, state(i), item_.slot);
  }

 private:
  // ---- where things are; sizes are multiples of a line

  static int64_t channel_floats(const Params& p) { return (p.head_dim + 31) / 16 * 16; }
  static int64_t head_floats(const Params& p) { return (p.head_dim + kPanel - 1) / kPanel * kRows * kPanel; }
  static int64_t tokens_floats(const Params& p) { return kChunk * p.d_state + kSlack; }
  static int64_t state_floats(const Params& p) { return whole_tiles(p.d_state) * kPanel; }

  int64_t token(const Operand& o, int64_t i) const {  // of the chunk
    return item_.sequence * o.strides[0] + (item_.first + start_ + i) * o.strides[1];
  }

  int64_t row_of(const Operand& o, int64_t i) const { return item_.stage ? i * o.strides[1] : token(o, i); }

  T* y_at(int64_t i, int64_t head) const {
    const int64_t row = item_.stage ? i : item_.sequence * p_.length + item_.first + start_ + i;
    return static_cast<T*>(p_.y) + row * p_.y_row + head * p_.head_dim;
  }

  int64_t head_of(int64_t in_group) const { return item_.group * (p_.heads / p_.groups) + in_group; }

  float* state(int64_t panel) { return states_ + (panel - item_.begin) * state_floats(p_); }

  int64_t state_row(const Operand& o, int64_t panel, int64_t row, int64_t slot) const {
    return slot * o.strides[0] + head_of(panel / panels_) * o.strides[1] +
           (panel % panels_ * kPanel + row) * o.strides[2];
  }

  int64_t width(int64_t panel) const { return std::min(kPanel, p_.head_dim - panel % panels_ * kPanel); }

  // ---- states

  void read_state(int64_t panel) {
    float* H = state(panel);
    std::fill_n(H, state_floats(p_), 0.f);
    if (!starts_from_state()) return;
    const Operand& from = p_.initial;
    for (int64_t row = 0; row < width(panel); ++row) {
      float* to = state_rows_ + row * p_.d_state;
      widen(from, state_row(from, panel, row, item_.slot), from.strides[3], p_.d_state, to);
    }
    transpose(state_rows_, p_.d_state, width(panel), p_.d_state, H, kPanel);
  }

  void write_state(int64_t panel, const float* H, int64_t slot) {
    transpose(H, kPanel, p_.d_state, width(panel), state_rows_, p_.d_state);
    for (int64_t row = 0; row < width(panel); ++row) {
      const float* from = state_rows_ + row * p_.d_state;
      narrow(from, p_.d_state, p_.final, state_row(p_.final, panel, row, slot), p_.final.strides[3]);
    }
  }

  bool starts_from_state() const { return p_.initial.data && item_.has_initial; }

  // ---- what the heads of a group share

  void read_rows(const Operand& o, float* transposed) {
    const int64_t N = p_.d_state, group = item_.group * o.strides[2];
    for (int64_t i = 0; i < n_; ++i) {
      widen(static_cast<const T*>(o.data) + row_of(o, i) + group, o.strides[3], N, B_ + i * N);
    }
    transpose(B_, N, n_, N, transposed, kChunk);
  }

  // B as it is and transposed, C transposed, and C . B at and below the diagonal.
  void share_group() {
    read_rows(p_.C, C_t_);
    read_rows(p_.B, B_t_);
    for (int64_t row = 0; row < n_; row += kTileRows) {
      for_panels(std::min(row + kTileRows, kChunk), [&](auto vectors, int64_t col) {
        Tile<vectors> tile;
        tile.zero();
        tile.add(Columns{C_t_ + row, kChunk}, B_t_ + col, kChunk, 0, p_.d_state);
        tile.store(scores_ + row * kChunk + col, kChunk);
      });
    }
  }

  // ---- one head

  void run_head(int64_t in_group) {
    const int64_t head = head_of(in_group);
    decays_.fill(p_, head, token(p_.dt, 0) + head * p_.dt.strides[2], n_);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j <= i; j += kLanes) {
        const int64_t at = i * kChunk + j;
        store(M_ + at, load(scores_ + at) * (decays_.between(i, j) * load(decays_.dt + j)));
      }
    }
    decays_.to_end(n_, weights_);
    find_next(in_group);
    read_x(head);
    const int64_t begin = std::max(item_.begin, in_group * panels_), end = std::min(item_.end, (in_group + 1) * panels_);
    for (int64_t i = begin; i < end; ++i) {
      width(i) > kLanes ? run_panel<2>(i, head) : run_panel<1>(i, head);
    }
    const int64_t first = begin % panels_ * kPanel;
    write_y(head, first, std::min(first + (end - begin) * kPanel, p_.head_dim));
  }

  // The head after this one, or the first one in the next chunk.
  void find_next(int64_t in_group) {
    const int64_t first = item_.begin / panels_, last = (item_.end - 1) / panels_;
    if (in_group < last) {
      next_ = {head_of(in_group + 1), 0};
    } else {
      next_ = {start_ + 2 * kChunk <= item_.length ? head_of(first) : -1, kChunk};
    }
  }

  template <int V>
  void run_panel(int64_t panel, int64_t head) {
    const int64_t at = panel % panels_;
    const float* x = x_ + at * kRows * kPanel;
    float *H = state(panel), *y = y_ + at * kRows * kPanel;
    for (int64_t row = 0; row < n_; row += kTileRows) {
      prefetch(row, head, at * kPanel);
      if (item_.stage) item_.stage->meanwhile();
      Tile<V> tile;
      tile.zero();
      if (start_ > 0 || starts_from_state()) {
        tile.add(Columns{C_t_ + row, kChunk}, H, kPanel, 0, p_.d_state);
        tile.scale_rows(decays_.from_start + row);
      }
      tile.add_lower(Rows<kChunk>{M_ + row * kChunk}, x, kPanel, row);
      tile.store(y + row * kPanel, kPanel);
    }
    write_checkpoints<V>(panel, x);
    advance<V>(H, n_, xw_ + at * kRows * kPanel, H);
  }

  // Asks for what the next head will read in these rows and columns, and for what this one will write: the rows of an
  // operand lie pages apart, where the hardware does not look ahead. Saves 7 % at 1024 tokens of Nemotron 3 Nano.
  void prefetch(int64_t row, int64_t head, int64_t col) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t last = std::min(row + kTileRows, n_);
    for (int64_t i = row; i < last; ++i) __builtin_prefetch(y_at(i, head) + col, 1);
    if (next_.head < 0) return;
    const auto ask = [&](const Operand& o, int64_t head_or_group, int64_t begin, int64_t end) {
      if (!o.data) return;
      for (int64_t i = row; i < last; ++i) {
        const T* p = static_cast<const T*>(o.data) + row_of(o, i + next_.ahead) + head_or_group * o.strides[2];
        for (int64_t c = begin; c < end; c += kLine) __builtin_prefetch(p + c * o.strides[3]);
      }
    };
    ask(p_.x, next_.head, col, std::min(col + kPanel, p_.head_dim));
    ask(p_.z, next_.head, col, std::min(col + kPanel, p_.head_dim));
    if (next_.ahead == 0 || col > 0 || item_.stage) return;
    ask(p_.B, item_.group, 0, p_.d_state);
    ask(p_.C, item_.group, 0, p_.d_state);
  }

  // Calls body(vector, floats) for the vectors of a row of head_dim elements; they lie in panels.
  template <typename Body>
  N3_LANE_FN void for_vectors(const Operand& o, int64_t offset, const Body& body) {
    const T* row = static_cast<const T*>(o.data) + offset;
    const int64_t cols = p_.head_dim, whole = o.strides[3] == 1 ? cols / kLanes * kLanes : 0;
    for (int64_t c = 0; c < whole; c += kLanes) body(c, load(row + c));
    if (whole == cols) return;
    widen(row + whole * o.strides[3], o.strides[3], cols - whole, row_);
    for (int64_t c = whole; c < cols; c += kLanes) body(c, load(row_ + c - whole));
  }

  // Where row i, column c is in x_, xw_ and y_.
  static int64_t in_panels(int64_t i, int64_t c) { return c / kPanel * kRows * kPanel + i * kPanel + c % kPanel; }

  // x of the head, and x weighted for the state.
  void read_x(int64_t head) {
    for (int64_t i = 0; i < n_; ++i) {
      const F32 w = splat(weights_[i]);
      for_vectors(p_.x, row_of(p_.x, i) + head * p_.x.strides[2], [&](int64_t c, F32 v) {
        const int64_t at = in_panels(i, c);
        store(x_ + at, v);
        store(xw_ + at, v * w);
      });
    }
  }

  void write_y(int64_t head, int64_t begin, int64_t end) {
    const Operand &z = p_.z, &D = p_.D;
    if (D.data) widen(D, head * D.strides[0], D.strides[1], p_.head_dim, D_);
    for (int64_t i = 0; i < n_; ++i) {
      if (z.data) {
        for_vectors(z, token(z, i) + head * z.strides[2], [&](int64_t c, F32 v) { store(gate_ + c, silu(v)); });
      }
      T* y = y_at(i, head);
      for (int64_t c = begin; c < end; c += kLanes) {
        const int64_t at = in_panels(i, c), left = end - c;
        F32 v = load(y_ + at);
        if (D.data) v = fma(load(D_ + c), load(x_ + at), v);
        if (z.data) v *= load(gate_ + c);
        left >= kLanes ? store(y + c, v) : store_part(y + c, v, left);
      }
    }
  }

  // out = H after the first n tokens; xw: their x, weighted.
  template <int V>
  void advance(const float* H, int64_t n, const float* xw, float* out) {
    for (int64_t row = 0; row < p_.d_state; row += kTileRows) {
      if (item_.stage) item_.stage->meanwhile();
      Tile<V> tile;
      tile.load(H + row * kPanel, kPanel);
      tile.scale(decays_.from_start[n - 1]);
      tile.add(Columns{B_ + row, p_.d_state}, xw, kPanel, 0, n);
      tile.store(out + row * kPanel, kPanel);
    }
  }

  // The state after a token is the one at the end of a chunk that ends there.
  template <int V>
  void write_checkpoints(int64_t panel, const float* x) {
    for (int64_t k = 0; k < item_.checkpoint_count; ++k) {
      const Checkpoint& checkpoint = item_.checkpoints[k];
      const int64_t n = checkpoint.token - start_ + 1;
      if (n < 1 || n > n_) continue;
      alignas(64) float weights[kChunk];
      decays_.to_end(n, weights);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = i * kPanel; c < i * kPanel + V * kLanes; c += kLanes) {
          store(kept_x_ + c, load(x + c) * splat(weights[i]));
        }
      }
      advance<V>(state(panel), n, kept_x_, kept_);
      write_state(panel, kept_, checkpoint.slot);
    }
  }

  const Params& p_;
  const Item& item_;
  int64_t panels_, start_ = 0, n_ = 0;                    // panels of a head; the chunk: its first token, its tokens
  float *B_, *B_t_, *C_t_;                                // [kChunk, d_state]; [d_state, kChunk]
  float *scores_, *M_;                                    // [kRows, kChunk]
  float *x_, *xw_, *y_;                                   // of a head: [panels, kRows, kPanel]
  float *row_, *D_, *gate_;                               // [head_dim]
  float *kept_x_, *kept_;                                 // of a checkpoint: [kRows, kPanel]; [d_state, kPanel]
  float *state_rows_, *states_;                           // [kPanel, d_state]; [panels, d_state, kPanel]
  struct {
    int64_t head, ahead;  // -1: none; tokens
  } next_;
  Decays decays_;
  alignas(64) float weights_[kChunk];
};

inline int64_t scratch_floats(const Params& p, int64_t panels) { return Scan<float>::scratch_floats(p, panels); }

inline void run(const Params& p, const Item& item, float* scratch) {
  switch (p.x.dtype) {
    case ScalarType::Float: return Scan<float>(p, item, scratch).run();
    case ScalarType::Half: return Scan<Half>(p, item, scratch).run();
    default: Scan<BFloat16>(p, item, scratch).run();
  }
}

constexpr Kernels kKernels = {kPanel, scratch_floats, run};

}  // namespace
}  // namespace n3::ssd_scan
