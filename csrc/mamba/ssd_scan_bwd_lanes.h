// The backward scan of one item, compiled once per instruction set; ssd_scan_bwd_kernels.h states the arithmetic.
//
// Two sweeps: forward, for the states that enter the chunks, and back, with the gradient of the state. Only one state
// per segment of 16 chunks is kept from the first sweep; a segment's others are computed again before it is swept back,
// so scratch grows with length / 1024 rather than length / 64. Most matrices have the tokens of the chunk as columns:
// dot products over channels and states are then sums of rows, in one order for every vector length.
#pragma once
#include "ssd_scan_bwd_kernels.h"
#include "ssd_scan_lanes.h"

namespace n3::ssd_scan_bwd {
namespace {

using ssd_scan::Decays;
using ssd_scan::kChunk;
using ssd_scan::kRows;
using ssd_scan::kSlack;
using ssd_scan::narrow;
using ssd_scan::widen;

constexpr int64_t kSegment = 16;  // chunks

// Element (row, k) is p[row * ld + k].
struct RowsAt {
  const float* p;
  int64_t ld;

  N3_LANE_FN float at(int row, int64_t k) const { return p[row * ld + k]; }
};

// Column c by factors[c].
template <int V>
N3_LANE_FN void scale_columns(Tile<V>& tile, const float* factors) {
  F32 f[V];
  for (int c = 0; c < V; ++c) f[c] = load(factors + c * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < V; ++c) tile.v[r][c] *= f[c];
  }
}

// Sums of products of floats in 16 chains whatever the vector, added in order.
inline double dot(const float* a, const float* b, int64_t n) {
  constexpr int kVectors = 16 / kLanes;
  F32 sum[kVectors] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int c = 0; c < kVectors; ++c) sum[c] = fma(load(a + i + c * kLanes), load(b + i + c * kLanes), sum[c]);
  }
  float chains[16];
  for (int c = 0; c < kVectors; ++c) store(chains + c * kLanes, sum[c]);
  double total = 0;
  for (const float chain : chains) total += chain;
  for (; i < n; ++i) total += double(a[i]) * b[i];
  return total;
}

class Backward {
 public:
  Backward(const Params& p, const Item& item, float* scratch)
      : p_(p), f_(p.forward), item_(item), P_(f_.head_dim), N_(f_.d_state), ldp_(width(P_)), ldn_(width(N_)) {
    const auto take = [&](int64_t floats, bool zeros = true) {
      float* block = scratch;
      scratch += floats;
      if (zeros) std::fill_n(block, floats, 0.f);
      return block;
    };
    B_ = take(tokens_by(N_)), C_ = take(tokens_by(N_)), row_ = take(width(std::max(P_, N_)));
    B_t_ = take(by_tokens(N_)), C_t_ = take(by_tokens(N_));
    dB_t_ = take(by_tokens(N_)), dC_t_ = take(by_tokens(N_));
    scores_ = take(kRows * kChunk), M_ = take(kRows * kChunk), R_ = take(kRows * kChunk);
    W_ = take(kRows * kChunk), turned_ = take(kRows * kChunk);
    x_ = take(tokens_by(P_)), dy_ = take(tokens_by(P_)), z_ = take(tokens_by(P_)), u_ = take(tokens_by(P_));
    x_t_ = take(by_tokens(P_)), dy_t_ = take(by_tokens(P_)), u_t_ = take(by_tokens(P_));
    J_ = take(heads() * state_floats()), H_ = take(heads() * state_floats());
    entering_ = take(kSegment * heads() * state_floats(), false);
    kept_ = take(0, false);
  }

  static int64_t scratch_floats(const Params& params, int64_t heads, int64_t length) {
    const ssd_scan::Params& f = params.forward;
    const int64_t P = f.head_dim, N = f.d_state, segments = segments_of(length);
    return 2 * tokens_by(N) + width(std::max(P, N)) + 4 * by_tokens(N) + 5 * kRows * kChunk + 4 * tokens_by(P) +
           3 * by_tokens(P) + (2 + kSegment + segments) * heads * state_floats(P, N);
  }

  void run() {
    for (int64_t h = 0; h < heads(); ++h) {
      read_state(f_.initial, h, H_);
      read_state(p_.grad_final, h, J_);
    }
    const int64_t chunks = chunks_of(item_.length), segments = segments_of(item_.length), all = heads() * state_floats();
    for (int64_t s = 0; s < segments; ++s) {
      std::copy_n(H_, all, kept_ + s * all);
      for (int64_t c = s * kSegment; s + 1 < segments && c < (s + 1) * kSegment; ++c) advance(c);
    }
    for (int64_t s = segments - 1; s >= 0; --s) {
      const int64_t begin = s * kSegment, end = std::min(begin + kSegment, chunks);
      std::copy_n(kept_ + s * all, all, H_);
      for (int64_t c = begin; c < end; ++c) {
        std::copy_n(H_, all, entering_ + (c - begin) * all);
        if (c + 1 < end) advance(c);
      }
      for (int64_t c = end - 1; c >= begin; --c) sweep_back(c, entering_ + (c - begin) * all);
    }
    for (int64_t h = 0; h < heads() && p_.dinitial.data; ++h) write_state(p_.dinitial, h);
  }

 private:
  // ---- where things are

  static int64_t width(int64_t cols) { return (cols + 15) / 16 * 16; }
  static int64_t tokens_by(int64_t cols) { return kRows * width(cols) + kSlack; }
  static int64_t by_tokens(int64_t rows) { return whole_tiles(rows) * kChunk + kSlack; }
  static int64_t state_floats(int64_t P, int64_t N) { return whole_tiles(P) * width(N) + kSlack; }
  static int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }
  static int64_t segments_of(int64_t length) { return (chunks_of(length) + kSegment - 1) / kSegment; }

  int64_t state_floats() const { return state_floats(P_, N_); }
  int64_t heads() const { return item_.end - item_.begin; }

  int64_t token(const Operand& o, int64_t i) const {  // of the chunk
    return item_.sequence * o.strides[0] + (item_.first + start_ + i) * o.strides[1];
  }

  void set_chunk(int64_t c) {
    start_ = c * kChunk;
    n_ = std::min(kChunk, item_.length - start_);
  }

  // ---- states: [head_dim, d_state]

  void read_state(const Operand& o, int64_t h, float* states) {
    float* to = states + h * state_floats();
    for (int64_t row = 0; row < P_ && o.data; ++row) {
      const int64_t at = item_.sequence * o.strides[0] + (item_.begin + h) * o.strides[1] + row * o.strides[2];
      widen(o, at, o.strides[3], N_, to + row * ldn_);
    }
  }

  void write_state(const Operand& o, int64_t h) {
    for (int64_t row = 0; row < P_; ++row) {
      const int64_t at = item_.sequence * o.strides[0] + (item_.begin + h) * o.strides[1] + row * o.strides[2];
      narrow(J_ + h * state_floats() + row * ldn_, N_, o, at, o.strides[3]);
    }
  }

  // state = factor state + sum_i rows_i (columns of `tokens`) of the chunk.
  void update_state(float* state, float factor, const float* rows, const float* tokens) {
    for (int64_t row = 0; row < P_; row += kTileRows) {
      for_panels(N_, [&](auto vectors, int64_t col) {
        Tile<vectors> tile;
        tile.load(state + row * ldn_ + col, ldn_);
        tile.scale(factor);
        tile.add(Columns{rows + row, ldp_}, tokens + col, ldn_, 0, n_);
        tile.store(state + row * ldn_ + col, ldn_);
      });
    }
  }

  // ---- operands of a chunk

  void read_rows(const Operand& o, int64_t index, int64_t cols, int64_t ld, float* to) {
    for (int64_t i = 0; i < n_; ++i) widen(o, token(o, i) + index * o.strides[2], o.strides[3], cols, to + i * ld);
  }

  void write_rows(const float* rows, int64_t ld, int64_t cols, const Operand& o, int64_t index) {
    for (int64_t i = 0; i < n_; ++i) narrow(rows + i * ld, cols, o, token(o, i) + index * o.strides[2], o.strides[3]);
  }

  void read_decays(int64_t head) {
    const Operand& o = f_.dt;
    decays_.fill(f_, head, token(o, 0) + head * o.strides[2], n_);
    for (int64_t j = 0; j < n_; j += kLanes) {
      const F32 f = decays_.between(n_ - 1, j);
      store(to_end_ + j, f);
      store(weights_ + j, load(decays_.dt + j) * f);
    }
  }

  // out = rows of `in` by factors.
  void scale_rows(const float* in, const float* factors, float* out) {
    for (int64_t i = 0; i < n_; ++i) {
      const F32 f = splat(factors[i]);
      for (int64_t c = 0; c < ldp_; c += kLanes) store(out + i * ldp_ + c, load(in + i * ldp_ + c) * f);
    }
  }

  // The states after a chunk.
  void advance(int64_t c) {
    set_chunk(c);
    read_rows(f_.B, item_.group, N_, ldn_, B_);
    for (int64_t h = 0; h < heads(); ++h) {
      read_decays(item_.begin + h);
      read_rows(f_.x, item_.begin + h, P_, ldp_, x_);
      scale_rows(x_, weights_, u_);
      update_state(H_ + h * state_floats(), decays_.from_start[n_ - 1], u_, B_);
    }
  }

  // ---- a chunk, back

  void sweep_back(int64_t c, const float* entering) {
    set_chunk(c);
    read_rows(f_.B, item_.group, N_, ldn_, B_);
    read_rows(f_.C, item_.group, N_, ldn_, C_);
    transpose(B_, ldn_, n_, N_, B_t_, kChunk);
    transpose(C_, ldn_, n_, N_, C_t_, kChunk);
    std::fill_n(dB_t_, by_tokens(N_), 0.f);
    std::fill_n(dC_t_, by_tokens(N_), 0.f);
    std::fill_n(R_, kRows * kChunk, 0.f);
    lower_product(C_t_, B_t_, N_, scores_);
    for (int64_t h = 0; h < heads(); ++h) head_back(h, entering + h * state_floats());
    // Above the diagonal R is zero, in whole panels.
    transpose(R_, kChunk, n_, kChunk, turned_, kChunk);
    for (int64_t row = 0; row < N_; row += kTileRows) {
      for_panels(n_, [&](auto vectors, int64_t col) {
        Tile<vectors> tile;
        tile.load(dB_t_ + row * kChunk + col, kChunk);
        tile.add(Columns{C_ + row, ldn_}, R_ + col, kChunk, col, n_);
        tile.store(dB_t_ + row * kChunk + col, kChunk);
        tile.load(dC_t_ + row * kChunk + col, kChunk);
        tile.add(Columns{B_ + row, ldn_}, turned_ + col, kChunk, 0, std::min(col + kPanel, n_));
        tile.store(dC_t_ + row * kChunk + col, kChunk);
      });
    }
    write_transposed(dB_t_, item_.dB);
    write_transposed(dC_t_, item_.dC);
  }

  void write_transposed(const float* columns, const Operand& o) {
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t k = 0; k < N_; ++k) row_[k] = columns[k * kChunk + i];
      narrow(row_, N_, o, token(o, i) + item_.group * o.strides[2], o.strides[3]);
    }
  }

  // out_ij = a_i . b_j at and below the diagonal, both transposed; what lies above it is undefined.
  void lower_product(const float* a_t, const float* b_t, int64_t depth, float* out) {
    for (int64_t row = 0; row < n_; row += kTileRows) {
      for_panels(std::min(row + kTileRows, kChunk), [&](auto vectors, int64_t col) {
        Tile<vectors> tile;
        tile.zero();
        tile.add(Columns{a_t + row, kChunk}, b_t + col, kChunk, 0, depth);
        tile.store(out + row * kChunk + col, kChunk);
      });
    }
  }

  void head_back(int64_t h, const float* H) {
    const int64_t head = item_.begin + h;
    float* J = J_ + h * state_floats();
    read_decays(head);
    read_rows(f_.x, head, P_, ldp_, x_);
    read_rows(p_.grad_y, head, P_, ldp_, dy_);
    transpose(x_, ldp_, n_, P_, x_t_, kChunk);
    if (f_.z.data) {
      read_rows(f_.z, head, P_, ldp_, z_);
      gate_back(head, H);
    }
    transpose(dy_, ldp_, n_, P_, dy_t_, kChunk);
    lower_product(dy_t_, x_t_, P_, W_);
    mask();
    input_gradient(J);
    double r[kChunk], k[kChunk];
    through_state(H, dy_t_, decays_.from_start, C_t_, dC_t_, r);
    through_state(J, x_t_, weights_, B_t_, dB_t_, k);
    step_gradient(h, r, k, double(decays_.from_start[n_ - 1]) * dot_of_states(J, H));
    write_dx(head);
    skip_gradient(item_.partials[h].dD);
    scale_rows(dy_, decays_.from_start, u_);
    update_state(J, decays_.from_start[n_ - 1], u_, C_);
  }

  // M = (C . B) L, R += L dt (dy . x), W = (C . B) L dt (dy . x), zero above the diagonal.
  void mask() {
    I32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j <= i; j += kLanes) {
        const int64_t at = i * kChunk + j;
        const auto past = lane <= I32{} + int32_t(i - j);
        const F32 L = decays_.between(i, j), scores = load(scores_ + at);
        const F32 R = L * load(decays_.dt + j) * load(W_ + at);
        store(M_ + at, past ? scores * L : F32{});
        store(R_ + at, past ? load(R_ + at) + R : F32{});
        store(W_ + at, past ? scores * R : F32{});
      }
    }
  }

  // u, transposed.
  void input_gradient(const float* J) {
    for (int64_t row = 0; row < P_; row += kTileRows) {
      for_panels(n_, [&](auto vectors, int64_t col) {
        Tile<vectors> tile;
        tile.zero();
        tile.add(RowsAt{J + row * ldn_, ldn_}, B_t_ + col, kChunk, 0, N_);
        scale_columns(tile, to_end_ + col);
        tile.add(Columns{dy_ + row, ldp_}, M_ + col, kChunk, col, n_);
        tile.store(u_t_ + row * kChunk + col, kChunk);
      });
    }
  }

  // v_i = factors_i state^T tokens_i: added to the gradient of the projection (all transposed), and its dot products
  // with the projection.
  void through_state(const float* state, const float* tokens_t, const float* factors, const float* projection,
                     float* gradient, double* dots) {
    float sums[kChunk] = {};
    for (int64_t row = 0; row < N_; row += kTileRows) {
      for_panels(n_, [&](auto vectors, int64_t col) {
        Tile<vectors> tile;
        tile.zero();
        tile.add(Columns{state + row, ldn_}, tokens_t + col, kChunk, 0, P_);
        scale_columns(tile, factors + col);
        F32 sum[vectors];
        for (int c = 0; c < vectors; ++c) sum[c] = load(sums + col + c * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          if (row + r >= N_) break;
          for (int c = 0; c < vectors; ++c) {
            const int64_t at = (row + r) * kChunk + col + c * kLanes;
            store(gradient + at, load(gradient + at) + tile.v[r][c]);
            sum[c] = fma(load(projection + at), tile.v[r][c], sum[c]);
          }
        }
        for (int c = 0; c < vectors; ++c) store(sums + col + c * kLanes, sum[c]);
      });
    }
    for (int64_t i = 0; i < n_; ++i) dots[i] = sums[i];
  }

  double dot_of_states(const float* a, const float* b) {
    double sum = 0;
    for (int64_t row = 0; row < P_; ++row) sum += dot(a + row * ldn_, b + row * ldn_, N_);
    return sum;
  }

  // da, then dA, ddt and ddt_bias.
  void step_gradient(int64_t h, const double* r, const double* k, double whole) {
    const int64_t head = item_.begin + h;
    double da[kChunk];
    alignas(64) float suffix[kChunk] = {}, xu[kChunk] = {}, ddt[kChunk];
    double later = 0;
    for (int64_t t = n_ - 1; t >= 0; --t) {
      for (int64_t j = 0; j <= t; j += kLanes) store(suffix + j, load(suffix + j) + load(W_ + t * kChunk + j));
      double straddling[4] = {};
      for (int64_t j = 0; j < t; ++j) straddling[j % 4] += suffix[j];
      later += r[t];
      da[t] = (straddling[0] + straddling[1]) + (straddling[2] + straddling[3]) + later + whole;
    }
    for (int64_t row = 0; row < P_; ++row) {
      for (int64_t t = 0; t < n_; t += kLanes) {
        store(xu + t, fma(load(x_t_ + row * kChunk + t), load(u_t_ + row * kChunk + t), load(xu + t)));
      }
    }
    Partial& partial = item_.partials[h];
    const double A = ssd_scan::scalar(f_.A, head * f_.A.strides[0]);
    double earlier = 0;
    for (int64_t t = 0; t < n_; ++t) {
      da[t] += earlier;
      earlier += k[t];
      partial.dA += decays_.dt[t] * da[t];
      ddt[t] = float(xu[t] + A * da[t]);
    }
    to_raw_step(head, ddt);
    for (int64_t t = 0; t < n_; ++t) partial.ddt_bias += ddt[t];
    narrow(ddt, n_, p_.ddt, token(p_.ddt, 0) + head * p_.ddt.strides[2], p_.ddt.strides[1]);
  }

  // From the clamped step to dt + dt_bias.
  void to_raw_step(int64_t head, float* ddt) {
    alignas(64) float raw[kChunk] = {};
    widen(f_.dt, token(f_.dt, 0) + head * f_.dt.strides[2], f_.dt.strides[1], n_, raw);
    const F32 bias = splat(f_.dt_bias.data ? ssd_scan::scalar(f_.dt_bias, head * f_.dt_bias.strides[0]) : 0.f);
    for (int64_t t = 0; t < n_; t += kLanes) {
      const F32 v = load(raw + t) + bias, step = f_.dt_softplus ? softplus(v) : v;
      F32 g = load(ddt + t);
      if (f_.dt_softplus) g = v > 20.f ? g : g * sigmoid(v);
      g = step < splat(f_.dt_min) ? F32{} : step > splat(f_.dt_max) ? F32{} : g;
      store(ddt + t, g);
    }
  }

  void write_dx(int64_t head) {
    transpose(u_t_, kChunk, P_, n_, u_, ldp_);
    const Operand& D = f_.D;
    std::fill_n(row_, ldp_, 0.f);
    if (D.data) widen(D, head * D.strides[0], D.strides[1], P_, row_);
    for (int64_t i = 0; i < n_; ++i) {
      const F32 step = splat(decays_.dt[i]);
      for (int64_t c = 0; c < ldp_; c += kLanes) {
        const int64_t at = i * ldp_ + c;
        F32 v = load(u_ + at) * step;
        if (D.data) v = fma(load(row_ + c), load(dy_ + at), v);
        store(u_ + at, v);
      }
    }
    write_rows(u_, ldp_, P_, p_.dx, head);
  }

  void skip_gradient(float* dD) {
    for (int64_t i = 0; i < n_ && f_.D.data; ++i) {
      for (int64_t c = 0; c < P_; ++c) dD[c] = fma_of(dy_[i * ldp_ + c], x_[i * ldp_ + c], dD[c]);
    }
  }

  static float fma_of(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

  // dz = grad_y y s(z) (1 + z (1 - s(z))) with the y before the gate, computed again; then dy = grad_y silu(z).
  void gate_back(int64_t head, const float* H) {
    for (int64_t i = 0; i < n_; ++i) {  // rows are the later token
      for (int64_t j = 0; j < kChunk; j += kLanes) {
        const int64_t at = i * kChunk + j;
        store(M_ + at, load(scores_ + at) * (decays_.between(i, j) * load(decays_.dt + j)));
      }
      std::fill(M_ + i * kChunk + i + 1, M_ + (i + 1) * kChunk, 0.f);
    }
    transpose(M_, kChunk, n_, kChunk, turned_, kChunk);
    for (int64_t row = 0; row < P_; row += kTileRows) {
      for_panels(n_, [&](auto vectors, int64_t col) {
        Tile<vectors> tile;
        tile.zero();
        tile.add(RowsAt{H + row * ldn_, ldn_}, C_t_ + col, kChunk, 0, N_);
        scale_columns(tile, decays_.from_start + col);
        tile.add(Columns{x_ + row, ldp_}, turned_ + col, kChunk, 0, std::min(col + kPanel, n_));
        tile.store(u_t_ + row * kChunk + col, kChunk);
      });
    }
    transpose(u_t_, kChunk, P_, n_, u_, ldp_);
    const Operand& D = f_.D;
    std::fill_n(row_, ldp_, 0.f);
    if (D.data) widen(D, head * D.strides[0], D.strides[1], P_, row_);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t c = 0; c < ldp_; c += kLanes) {
        const int64_t at = i * ldp_ + c;
        const F32 z = load(z_ + at), s = sigmoid(z), g = load(dy_ + at);
        const F32 y = D.data ? fma(load(row_ + c), load(x_ + at), load(u_ + at)) : load(u_ + at);
        store(u_ + at, g * y * s * fma(z, 1.f - s, splat(1.f)));
        store(dy_ + at, g * (z * s));
      }
    }
    write_rows(u_, ldp_, P_, p_.dz, head);
    std::fill_n(M_, kRows * kChunk, 0.f);
  }

  const Params& p_;
  const ssd_scan::Params& f_;
  const Item& item_;
  const int64_t P_, N_, ldp_, ldn_;  // head_dim, d_state, and these in whole vectors
  int64_t start_ = 0, n_ = 0;        // the chunk: its first token, its tokens
  float* row_;
  float *B_, *C_;                       // [tokens, d_state]
  float *B_t_, *C_t_, *dB_t_, *dC_t_;   // [d_state, tokens]
  float *scores_, *M_, *R_, *W_;        // [tokens, tokens], rows the later token; R summed over the heads
  float* turned_;                       // R or M, transposed
  float *x_, *dy_, *z_, *u_;            // [tokens, head_dim]
  float *x_t_, *dy_t_, *u_t_;           // [head_dim, tokens]
  float *J_, *H_, *entering_, *kept_;   // states: [head]; [chunk of the segment, head]; [segment, head]
  Decays decays_;
  alignas(64) float to_end_[kChunk], weights_[kChunk];  // f, dt f
};

inline void run(const Params& p, const Item& item, float* scratch) { Backward(p, item, scratch).run(); }

constexpr Kernels kBackwardKernels = {Backward::scratch_floats, run};

}  // namespace
}  // namespace n3::ssd_scan_bwd
