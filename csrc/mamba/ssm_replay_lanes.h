// Decoding from an older state and a ring, compiled once per instruction set by a file that defines N3_LANES. The
// products C_t . B_j are made once per group, their weights once per head; then a row of the state is read once and
// gives a dot product to each token, and everything since it was written is a few multiples of rows of x.
#pragma once
#include "ssm_replay_kernels.h"

#include "ssm_update_lanes.h"

namespace n3::ssm_replay {
namespace {

using ssm_update::get;
using ssm_update::put;
using ssm_update::Row;
using ssm_update::Rows;
using ssm_update::Sum;
using ssm_update::View;

// What a thread keeps at hand. Entries are numbered: the n committed ones, then the tokens of the call.
struct Work {
  ssm_update::Work own;      // of the tokens
  int64_t pitch, entries;    // of rows over the state dimension; room for entries in a row of weights
  float* B;                  // [R, pitch], committed
  float* dt;                 // [entries]
  float* x;                  // [R, kBlock], committed
  float* products;           // [T, entries]: C_t . B_j
  float* weights;            // [T, entries]: of x_j in y_t
  float* carry;              // [T]: of the state in y_t
  float* share;              // [entries]: of x_j B_j in the folded state; behind the last, of the state
  float* rates;              // [entries, kRows]: share times x, of the rows being folded
  double* sums;              // [entries]: of A dt up to and with an entry
  int64_t sequence = -1, group = -1, head = -1;

  N3_LANE_FN Work(const Problem& p, float* memory) : own(p.update, memory), pitch(own.pitch) {
    const int64_t tokens = p.update.tokens;
    memory += ssm_update::workspace_floats(p.update);
    entries = padded(p.size + tokens);
    const auto take = [&](int64_t floats) {
      float* const at = memory;
      memory += floats;
      return at;
    };
    memory += (reinterpret_cast<uintptr_t>(memory) & 4) / 4;  // doubles are aligned
    sums = reinterpret_cast<double*>(take(2 * entries));
    B = take(p.size * pitch), dt = take(entries), x = take(p.size * kBlock);
    products = take(tokens * entries), weights = take(tokens * entries);
    carry = take(padded(tokens)), share = take(entries + kTile), rates = take(entries * kRows);
  }
};

N3_LANE_FN int64_t place_of(const Problem& p, const Sequence& q, int64_t entry) { return (q.start + entry) % p.size; }

// Whether token j is token t or one that it continues.
N3_LANE_FN bool leads_to(const Sequence& q, int64_t j, int64_t t) {
  if (!q.parents) return j <= t;
  while (t > j) t = q.parents[t];
  return t == j;
}

// ---- of a group

// out[j] = a . row j, for `count` rows; both in the workspace, padded with zeros.
void products_of(const float* a, const float* rows, int64_t pitch, int64_t count, float* out) {
  const auto go = [&](auto r_constant, int64_t j) {
    constexpr int R = decltype(r_constant)::value;
    Sum sums[R];
    for (int64_t i = 0; i < pitch; i += kTile) {
      for (int part = 0; part < ssm_update::kParts; ++part) {
        const F32 v = load(a + i + part * kLanes);
        for (int r = 0; r < R; ++r) {
          const F32 b = load(rows + (j + r) * pitch + i + part * kLanes);
          sums[r].part[part] = fma(v, b, sums[r].part[part]);
        }
      }
    }
    ssm_update::total<R>(sums, out + j);
  };
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) go(std::integral_constant<int, 4>(), j);
  for (; j < count; ++j) go(std::integral_constant<int, 1>(), j);
}

void enter_group(const Problem& p, const Sequence& q, const Work& w, int64_t b, int64_t group) {
  const ssm_update::Problem& u = p.update;
  const View ring{q.B, p.element, {}};
  for (int64_t j = 0; j < q.count; ++j) {
    ssm_update::widen(ring, place_of(p, q, j) * p.B_strides[0] + group * p.B_strides[1], p.B_strides[2], u.d_state,
                      w.pitch, w.B + j * w.pitch);
  }
  for (int64_t t = 0; t < u.tokens; ++t) {
    const auto at = [&](const View& v) { return b * v.strides[0] + t * v.strides[1] + group * v.strides[2]; };
    ssm_update::widen(u.B, at(u.B), u.B.strides[3], u.d_state, w.pitch, w.own.B + t * w.pitch);
    ssm_update::widen(u.C, at(u.C), u.C.strides[3], u.d_state, w.pitch, w.own.C + t * w.pitch);
    products_of(w.own.C + t * w.pitch, w.B, w.pitch, q.count, w.products + t * w.entries);
    products_of(w.own.C + t * w.pitch, w.own.B, w.pitch, t + 1, w.products + t * w.entries + q.count);
  }
}

// ---- of a head

// Decays are exponentials of differences of sums of A dt in double precision: the sums may be a hundred times what
// matters of them.
void enter_head(const Problem& p, const Sequence& q, const Work& w, int64_t b, int64_t head) {
  const ssm_update::Problem& u = p.update;
  const int64_t n = q.count, all = n + u.tokens;
  const double A = u.A[head];
  for (int64_t j = 0; j < n; ++j) {
    w.dt[j] = q.dt[place_of(p, q, j) * p.dt_strides[0] + head * p.dt_strides[1]];
    w.sums[j] = (j ? w.sums[j - 1] : 0.) + A * double(w.dt[j]);
  }
  const double committed = n ? w.sums[n - 1] : 0.;
  if (u.tokens) ssm_update::time_steps(u, w.own, b, head, u.tokens);
  for (int64_t t = 0; t < u.tokens; ++t) {
    const int64_t before = q.parents ? q.parents[t] : t - 1;
    w.dt[n + t] = w.own.dt[t];
    w.sums[n + t] = (before < 0 ? committed : w.sums[n + before]) + A * double(w.own.dt[t]);
  }
  const auto raise = [&](float* x, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(x + i, exp(load(x + i)));
    if (i < count) store_part(x + i, exp(load_part(x + i, count - i)), count - i);
  };
  for (int64_t t = 0; t < u.tokens; ++t) {
    float* weight = w.weights + t * w.entries;
    w.carry[t] = float(w.sums[n + t]);
    for (int64_t j = 0; j < all; ++j) weight[j] = float(w.sums[n + t] - w.sums[j]);
    raise(weight, n + t + 1);
    for (int64_t j = 0; j <= n + t; ++j) weight[j] *= w.dt[j] * w.products[t * w.entries + j];
  }
  raise(w.carry, u.tokens);
  if (!q.fold) return;
  for (int64_t j = 0; j < n; ++j) w.share[j] = float(committed - w.sums[j]);
  w.share[n] = float(committed);
  raise(w.share, n + 1);
  for (int64_t j = 0; j < n; ++j) w.share[j] *= w.dt[j];
}

// ---- of a block of rows

// y[t][r] = state row r . C_t, from a slot or from the workspace.
template <int R, typename In>
__attribute__((noinline)) void dots(const Rows<In> in, int64_t n, const float* C, float* y) {
  Row<In> from[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) from[r] = in.row(r);
  Sum sums[R];
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) {
    ssm_update::ask_ahead<R>(from[0].data, i);
#pragma GCC unroll 4
    for (int part = 0; part < ssm_update::kParts; ++part) {
      const F32 c = load(C + i + part * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r].part[part] = fma(from[r].get(i + part * kLanes), c, sums[r].part[part]);
      }
    }
  }
  for (int part = 0; part < ssm_update::kParts && i + part * kLanes < n; ++part) {
    const int64_t at = i + part * kLanes, some = n - at < kLanes ? n - at : kLanes;
    const F32 c = load(C + at);
    for (int r = 0; r < R; ++r) sums[r].part[part] = fma(from[r].get_some(at, some), c, sums[r].part[part]);
  }
  ssm_update::total<R>(sums, y);
}

// Folds the committed entries into R rows of the workspace. `x`: their values in these rows, kBlock apart.
template <int R>
__attribute__((noinline)) void fold_rows(const Work& w, const float* x, int64_t count, float* rows) {
  const F32 keep = splat(w.share[count]);
  for (int64_t j = 0; j < count; ++j) {
    for (int r = 0; r < R; ++r) w.rates[j * R + r] = w.share[j] * x[j * kBlock + r];
  }
  // Two vectors of a row at a time: a rate is broadcast once for both. The pitch is a multiple of 16.
  constexpr int kStride = kLanes == 16 ? 1 : 2;
  for (int64_t i = 0; i < w.pitch; i += kStride * kLanes) {
    F32 s[R][kStride];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < kStride; ++k) s[r][k] = keep * load(rows + r * w.pitch + i + k * kLanes);
    }
    for (int64_t j = 0; j < count; ++j) {
      F32 b[kStride];
#pragma GCC unroll 2
      for (int k = 0; k < kStride; ++k) b[k] = load(w.B + j * w.pitch + i + k * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F32 rate = splat(w.rates[j * R + r]);
        for (int k = 0; k < kStride; ++k) s[r][k] = fma(rate, b[k], s[r][k]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < kStride; ++k) store(rows + r * w.pitch + i + k * kLanes, s[r][k]);
    }
  }
}

template <typename T, int R>
void replay_rows(const Problem& p, const Sequence& q, const Work& w, int64_t head, int64_t row, int64_t in_block) {
  const ssm_update::Problem& u = p.update;
  const auto token_dots = [&](const auto& rows, int64_t t) {
    dots<R>(rows, u.d_state, w.own.C + t * w.pitch, w.own.y + t * kBlock + in_block);
  };
  const bool direct = q.state.layout->state[2] == 1 && u.tokens == 1 && !q.fold;
  if (direct) return token_dots(ssm_update::rows_of<const T>(q.state, head, row), 0);
  ssm_update::read_rows<T, R>(q.state, head, row, u.d_state, w.own.states, w.pitch);
  for (int64_t t = 0; t < u.tokens; ++t) token_dots(Rows<float>{w.own.states, w.pitch, nullptr, 0}, t);
  if (!q.fold) return;
  fold_rows<R>(w, w.x + in_block, q.count, w.own.states);
  ssm_update::write_rows<T, R>(w.own.states, w.pitch, u.d_state, q.state, head, row, u.head_dim, {nullptr, 0},
                               w.own.room);
}

// y_t += weighted rows of x, on top of the decayed state's part.
void add_entries(const Problem& p, const Sequence& q, const Work& w) {
  for (int64_t t = 0; t < p.update.tokens; ++t) {
    const float* weight = w.weights + t * w.entries;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      F32 y = splat(w.carry[t]) * load(w.own.y + t * kBlock + i);
      for (int64_t j = 0; j < q.count; ++j) y = fma(splat(weight[j]), load(w.x + j * kBlock + i), y);
      for (int64_t j = 0; j <= t; ++j) {
        if (leads_to(q, j, t)) y = fma(splat(weight[q.count + j]), load(w.own.x + j * kBlock + i), y);
      }
      store(w.own.y + t * kBlock + i, y);
    }
  }
}

template <typename T>
void copy_row(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t n) {
  const T* in = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  if (n > 0 && from_stride == 1 && to_stride == 1) {  // of nothing there may be no memory
    std::memcpy(out, in, n * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i * to_stride] = in[i * from_stride];
}

// The bits of n elements of an operand into a ring.
N3_LANE_FN void keep(const View& v, int64_t at, int64_t stride, char* ring, int64_t to, int64_t to_stride, int64_t n) {
  const int64_t size = v.element == Element::kFloat ? 4 : 2;
  const char* from = static_cast<const char*>(v.data) + at * size;
  if (size == 4) {
    copy_row<uint32_t>(from, stride, ring + to * 4, to_stride, n);
  } else {
    copy_row<uint16_t>(from, stride, ring + to * 2, to_stride, n);
  }
}

// The tokens' x, B and dt into the ring: of a block its x, of a head's first block dt, of a group's first head B.
void keep_tokens(const Problem& p, const Sequence& q, const Work& w, int64_t b, int64_t head, int64_t row,
                 int64_t rows) {
  const ssm_update::Problem& u = p.update;
  const int64_t ratio = u.heads / u.groups, group = head / ratio;
  for (int64_t t = 0; t < u.tokens; ++t) {
    const int64_t place = place_of(p, q, q.count + t);
    keep(u.x, b * u.x.strides[0] + t * u.x.strides[1] + head * u.x.strides[2] + row * u.x.strides[3], u.x.strides[3],
         q.x, place * p.x_strides[0] + head * p.x_strides[1] + row * p.x_strides[2], p.x_strides[2], rows);
    if (row) continue;
    q.dt[place * p.dt_strides[0] + head * p.dt_strides[1]] = w.own.dt[t];
    if (head % ratio) continue;
    keep(u.B, b * u.B.strides[0] + t * u.B.strides[1] + group * u.B.strides[2], u.B.strides[3], q.B,
         place * p.B_strides[0] + group * p.B_strides[1], p.B_strides[2], u.d_state);
  }
}

template <typename T>
void replay_item(const Problem& p, Work& w, int64_t b, int64_t head, int64_t row) {
  const ssm_update::Problem& u = p.update;
  const Sequence& q = p.sequences[b];
  const int64_t rows = u.head_dim - row < kBlock ? u.head_dim - row : kBlock;
  if (!q.state.data) return ssm_update::finish(u, w.own, b, head, row, rows, 0);
  const int64_t group = head / (u.heads / u.groups);
  if (b != w.sequence || group != w.group) enter_group(p, q, w, b, group);
  if (b != w.sequence || head != w.head) enter_head(p, q, w, b, head);
  w.sequence = b, w.group = group, w.head = head;
  const View ring{q.x, p.element, {}};
  for (int64_t j = 0; j < q.count; ++j) {
    ssm_update::widen(ring, place_of(p, q, j) * p.x_strides[0] + head * p.x_strides[1] + row * p.x_strides[2],
                      p.x_strides[2], rows, kBlock, w.x + j * kBlock);
  }
  for (int64_t t = 0; t < u.tokens; ++t) {
    const int64_t at = b * u.x.strides[0] + t * u.x.strides[1] + head * u.x.strides[2] + row * u.x.strides[3];
    ssm_update::widen(u.x, at, u.x.strides[3], rows, kBlock, w.own.x + t * kBlock);
    for (int64_t r = rows; r < kBlock; ++r) w.own.y[t * kBlock + r] = 0.f;
  }
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) replay_rows<T, kRows>(p, q, w, head, row + r, r);
  for (; r < rows; ++r) replay_rows<T, 1>(p, q, w, head, row + r, r);
  add_entries(p, q, w);
  ssm_update::finish(u, w.own, b, head, row, rows, u.tokens);
  keep_tokens(p, q, w, b, head, row, rows);
}

template <typename T>
__attribute__((noinline)) void replay_items(const Problem& p, float* workspace, int64_t begin, int64_t end) {
  Work w(p, workspace);
  const int64_t per_head = ssm_update::blocks(p.update);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / per_head % p.update.heads;
    replay_item<T>(p, w, item / per_head / p.update.heads, head, item % per_head * kBlock);
  }
}

void replay(const Problem& p, float* workspace, int64_t begin, int64_t end) {
  switch (p.update.state) {
    case Element::kFloat: return replay_items<float>(p, workspace, begin, end);
    case Element::kHalf: return replay_items<Half>(p, workspace, begin, end);
    default: return replay_items<BFloat16>(p, workspace, begin, end);
  }
}

}  // namespace
}  // namespace n3::ssm_replay
