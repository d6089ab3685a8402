// The state update, compiled once per instruction set by a file that defines N3_LANES. Vectors run along the state
// dimension; kRows rows advance together, which hides the latency of their sums and shares the loads of B and C. A
// state of one token goes from memory through registers to memory; of several tokens it stays in the L1 cache between
// the first and the last, and is rounded only where it is written.
#pragma once
#include "ssm_update_kernels.h"

#include "state_lanes.h"

namespace n3::ssm_update {
namespace {

// What a thread keeps at hand of the sequence, head and block it is at.
struct Work {
  int64_t pitch;                 // of rows over the state dimension
  float *B, *C;                  // [T, pitch]
  float *dt, *decay;             // [T]
  float *x, *z, *y;              // [T, kBlock]
  float *states;                 // [1 or T + 1, kRows, pitch]
  float *room;                   // a row and its random words
  int64_t sequence = -1, group = -1, head = -1;

  N3_LANE_FN Work(const Problem& p, float* memory) : pitch(padded(p.d_state)) {
    const auto take = [&](int64_t floats) {
      float* const at = memory;
      memory += floats;
      return at;
    };
    B = take(p.tokens * pitch), C = take(p.tokens * pitch);
    dt = take(padded(p.tokens)), decay = take(padded(p.tokens));
    x = take(p.tokens * kBlock), z = take(p.tokens * kBlock), y = take(p.tokens * kBlock);
    states = take((p.tree ? p.tokens + 1 : 1) * kRows * pitch);
    room = memory;
  }
};

// One token on R rows: s = decay s + u B, y = s . C. `out` may be `in`.
template <int R, typename In, typename Out>
__attribute__((noinline)) void step(const Rows<In> in, const Rows<Out> out, int64_t n, float decay, const float* u,
                                    const float* B, const float* C, float* y) {
  const F32 dA = splat(decay);
  F32 rate[R];
  Row<In> from[R];
  Out* to[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) rate[r] = splat(u[r]), from[r] = in.row(r), to[r] = out.row(r).data;
  Sum sums[R];
  int64_t i = 0;
  for (; i + kTile <= n; i += kTile) {
    ask_ahead<R>(from[0].data, i);
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = i + part * kLanes;
      const F32 b = load(B + at), c = load(C + at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F32 s = fma(dA, from[r].get(at), rate[r] * b);
        put(to[r] + at, s);
        sums[r].part[part] = fma(s, c, sums[r].part[part]);
      }
    }
  }
  for (int part = 0; part < kParts && i + part * kLanes < n; ++part) {
    const int64_t at = i + part * kLanes, some = n - at < kLanes ? n - at : kLanes;
    const F32 b = load(B + at), c = load(C + at);
    for (int r = 0; r < R; ++r) {
      const F32 s = fma(dA, from[r].get_some(at, some), rate[r] * b);
      store_part(to[r] + at, s, some);
      const F32 inside = lane_numbers() < int32_t(some) ? s : F32{};  // infinity times the zeros behind is NaN
      sums[r].part[part] = fma(inside, c, sums[r].part[part]);
    }
  }
  total<R>(sums, y);
}

// All tokens of one sequence on R rows of a head, from the slot that is read to those that are written.
template <typename T, int R>
void advance(const Problem& p, const Sequence& q, const Work& w, int64_t head, int64_t row, int64_t in_block) {
  const int64_t n = p.d_state, pitch = w.pitch;
  const auto write = [&](const float* from, int64_t after, int64_t token) {
    const Slot& to = q.written[after];
    if (!to.data) return;
    write_rows<T, R>(from, pitch, n, to, head, row, p.head_dim, {p.seed, uint64_t(token)}, w.room);
  };
  const auto cached = [&](int64_t state) -> Rows<float> {
    return {w.states + state * kRows * pitch, pitch, nullptr, 0};
  };
  const auto go = [&](const auto& in, const auto& out, int64_t t) {
    float u[R], y[R];
    for (int r = 0; r < R; ++r) u[r] = w.dt[t] * w.x[t * kBlock + in_block + r];
    step<R>(in, out, n, w.decay[t], u, w.B + t * pitch, w.C + t * pitch, y);
    for (int r = 0; r < R; ++r) w.y[t * kBlock + in_block + r] = y[r];
  };

  if (q.tokens == 0 || q.parents) {
    read_rows<T, R>(q.source, head, row, n, w.states, pitch);
    if (q.tokens == 0) write(w.states, 0, 0);
    for (int64_t t = 0; t < q.tokens; ++t) {
      go(cached(q.parents[t] + 1), cached(t + 1), t);
      write(cached(t + 1).data, t + 1, t);
    }
    return;
  }
  const bool direct_in = q.source.layout->state[2] == 1;
  if (!direct_in) read_rows<T, R>(q.source, head, row, n, w.states, pitch);
  const Rows<const T> source = rows_of<const T>(q.source, head, row);
  for (int64_t t = 0; t < q.tokens; ++t) {
    const bool from_slot = t == 0 && direct_in;
    if constexpr (!kScaled<T>) {
      const Slot& to = q.written[t + 1];
      if (t + 1 == q.tokens && to.data && to.layout->state[2] == 1 && !p.seed) {
        const Rows<T> last = rows_of<T>(to, head, row);
        from_slot ? go(source, last, t) : go(cached(0), last, t);
        return;
      }
    }
    from_slot ? go(source, cached(0), t) : go(cached(0), cached(0), t);
    write(w.states, t + 1, t);
  }
}

// dt = clamp(softplus(dt + bias)) and decay = exp(A dt) of the tokens of one head.
void time_steps(const Problem& p, const Work& w, int64_t b, int64_t head, int64_t tokens) {
  widen(p.dt, b * p.dt.strides[0] + head * p.dt.strides[2], p.dt.strides[1], tokens, padded(tokens), w.dt);
  const F32 bias = splat(p.dt_bias ? p.dt_bias[head] : 0.f), A = splat(p.A[head]);
  const F32 low = splat(p.dt_min), high = splat(p.dt_max);
  for (int64_t t = 0; t < tokens; t += kLanes) {
    F32 dt = load(w.dt + t) + bias;
    if (p.dt_softplus) dt = softplus(dt);
    dt = dt < low ? low : dt > high ? high : dt;
    store(w.dt + t, dt);
    store(w.decay + t, exp(A * dt));
  }
}

// y = (y + D x) * silu(z) of one block, into the output.
void finish(const Problem& p, const Work& w, int64_t b, int64_t head, int64_t row, int64_t rows,
                       int64_t tokens) {
  const int64_t leading = b * p.y.strides[0] + head * p.y.strides[2] + row * p.y.strides[3];
  float D[kBlock] = {};
  for (int64_t r = 0; p.D && r < rows; ++r) D[r] = p.D[p.D_has_channels ? head * p.head_dim + row + r : head];
  for (int64_t t = 0; t < p.tokens; ++t) {
    float* y = w.y + t * kBlock;
    if (t >= tokens) {
      std::memset(y, 0, kBlock * sizeof *y);
    } else {
      if (p.z.data) {
        const View& z = p.z;
        widen(z, b * z.strides[0] + t * z.strides[1] + head * z.strides[2] + row * z.strides[3], z.strides[3], rows,
              kBlock, w.z);
      }
      for (int64_t r = 0; r < kBlock; r += kLanes) {
        F32 v = load(y + r);
        if (p.D) v = fma(load(D + r), load(w.x + t * kBlock + r), v);
        if (p.z.data) v = v * silu(load(w.z + r));
        store(y + r, v);
      }
    }
    narrow(p.y, leading + t * p.y.strides[1], y, rows);
  }
}

template <typename T>
N3_LANE_FN void update_item(const Problem& p, Work& w, int64_t b, int64_t head, int64_t row) {
  const Sequence& q = p.sequences[b];
  const int64_t rows = p.head_dim - row < kBlock ? p.head_dim - row : kBlock, tokens = q.source.data ? q.tokens : 0;
  if (!q.source.data) return finish(p, w, b, head, row, rows, 0);
  const int64_t group = head / (p.heads / p.groups);
  if (b != w.sequence || group != w.group) {
    for (int64_t t = 0; t < tokens; ++t) {
      const auto at = [&](const View& v) { return b * v.strides[0] + t * v.strides[1] + group * v.strides[2]; };
      widen(p.B, at(p.B), p.B.strides[3], p.d_state, w.pitch, w.B + t * w.pitch);
      widen(p.C, at(p.C), p.C.strides[3], p.d_state, w.pitch, w.C + t * w.pitch);
    }
  }
  if (b != w.sequence || head != w.head) time_steps(p, w, b, head, tokens);
  w.sequence = b, w.group = group, w.head = head;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = b * p.x.strides[0] + t * p.x.strides[1] + head * p.x.strides[2] + row * p.x.strides[3];
    widen(p.x, at, p.x.strides[3], rows, kBlock, w.x + t * kBlock);
    for (int64_t r = rows; r < kBlock; ++r) w.y[t * kBlock + r] = 0.f;
  }
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) advance<T, kRows>(p, q, w, head, row + r, r);
  for (; r < rows; ++r) advance<T, 1>(p, q, w, head, row + r, r);
  finish(p, w, b, head, row, rows, tokens);
}

template <typename T>
__attribute__((noinline)) void update_items(const Problem& p, float* workspace, int64_t begin, int64_t end) {
  Work w(p, workspace);
  const int64_t per_head = blocks(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item % per_head, head = item / per_head % p.heads;
    update_item<T>(p, w, item / per_head / p.heads, head, block * kBlock);
  }
}

[[maybe_unused]] void update(const Problem& p, float* workspace, int64_t begin, int64_t end) {
  with_element(p.state, [&](auto t) { update_items<decltype(t)>(p, workspace, begin, end); });
}

}  // namespace
}  // namespace n3::ssm_update
