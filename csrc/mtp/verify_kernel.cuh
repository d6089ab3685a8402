// Modes token, block, relaxed and typical: a block walks through the rows of a request, of which the records say all
// but the last token. Rules in n3kernels/mtp/verify.py.
#pragma once
#include "chain.cuh"
#include "dense_law.cuh"
#include "draw.cuh"

namespace n3::mtp {

template <typename T, bool kLossy>
struct Verifier {
  const RowArgs& a;
  const VerifyArgs& c;
  DrawShared& shared;
  Unit u;
  Chain32 chain;
  int64_t seed, pos;
  Law<T> law;
  DenseLaw q;
  bool dense;
  uint32_t flags;
  double all;  // the sum of all weights of the row at hand
  int32_t count;

  N3_DEVICE Verifier(const RowArgs& rows, const RowArgs& drafts, const ColumnMap& columns, const VerifyArgs& call,
                     DrawShared& s)
      : a(rows), c(call), shared(s), law(rows, s), q{drafts, columns, 0, -1, 0, 0, 0, {}},
        dense(drafts.logits != nullptr), flags(0), all(1), count(0) {}

  N3_DEVICE int32_t draft(int32_t i) const { return c.drafts[u.first + i]; }
  N3_DEVICE int32_t unit(int32_t i) const { return u.request * a.width + i; }

  N3_DEVICE void put(int32_t i, int32_t token, double logprob) {
    if (threadIdx.x != 0) return;
    c.tokens[unit(i)] = token, c.logprobs[unit(i)] = float(logprob);
  }

  // Row i's law, and that of the draft it checks.
  N3_DEVICE void look(int32_t i) {
    Unit at = u;
    at.i = i;
    law.open(at, unit(i));
    flags |= law.flags;
    read_support();
    if (dense && i < chain.count) q.open(at, unit(i));
  }

  // The tokens of the law's support, each once, with their weights and q.
  N3_DEVICE void read_support() {
    const int32_t e = int32_t(threadIdx.x);
    const bool mine = e < a.entries;
    __syncthreads();
    if (mine) shared.token[e] = law_token(a, law.row, e), shared.q[e] = q_of_entry(e);
    if (e == 0) shared.apart = a.apart ? a.entries : 0;
    __syncthreads();
    const int32_t token = mine ? shared.token[e] : -1;
    bool again = false;
    double whole = 0, weighs = 0;
    for (int32_t f = 0; f < a.entries; ++f) {
      if (shared.token[f] != token) continue;
      again |= f < e, whole += shared.q[f];
    }
    if (mine && token >= 0 && !again) {
      if (law.only >= 0) {
        weighs = token == law.only;
      } else {
        const float x = a.gathered[int64_t(law.unit) * a.entries + e];
        weighs = law.keeps(x) ? exp(law.z(x)) : 0.;
      }
    }
    __syncthreads();
    if (mine) {
      shared.token[e] = again ? -1 : token, shared.q[e] = whole;
      shared.p[e] = shared.own[e] = weighs;
    }
    __syncthreads();
    if (!a.apart) {
      all = law.total;
      return;
    }
    double held = 0;
    for (int32_t f = 0; f < a.entries; ++f) held += shared.p[f];
    if (law.only >= 0 && held > 0) law.total = 0;
    all = law.total + held;
  }

  // 0 where it is not positive, NaN included.
  N3_DEVICE double q_of_entry(int32_t e) const {
    const double own = c.laws.probs ? double(c.laws.probs[law.row * a.entries + e]) : 1.;
    return own > 0 ? own : 0.;
  }

  N3_DEVICE int32_t entry_of(int32_t token) const {
    for (int32_t e = 0; e < a.entries; ++e) {
      if (shared.token[e] == token) return e;
    }
    return -1;
  }

  N3_DEVICE bool known(int32_t i) {
    if (draft(i) < a.vocab) return true;
    flags |= kOutOfRange;
    return false;
  }

  // p and q of draft i under row i; 0 where it cannot be accepted.
  struct Ratio {
    double p, q;
  };
  N3_DEVICE Ratio ratio(int32_t i) {
    if (!known(i)) return {0, 0};
    const int32_t e = entry_of(draft(i));
    const double own = dense ? q.of(draft(i)) : e >= 0 ? shared.q[e] : 0.;
    if (!(own > 0 && own < double(kInf32))) {
      flags |= kNotDrawn;
      return {0, 0};
    }
    return {e >= 0 ? shared.p[e] / all : 0., own};
  }

  // ---- what is left of w p where q is taken away, in units of the row's weights

  N3_DEVICE double left_of(double weight, double w, double own) const { return fmax(weight - all / w * own, 0.); }

  // Of the tile, to shared memory; `sum` of the block.
  N3_DEVICE double fill_left(int32_t tile, double w) {
    law.fill_weights(tile, [&](int32_t id, double weight) { return left_of(weight, w, q.of(id)); });
    double sum = 0;
    for (int32_t i = threadIdx.x; i < int32_t(kTile); i += kDrawThreads) sum += shared.weights[law.slot_of(i)];
    return sum_of_block<kDrawWarps>(sum, shared.sums);
  }

  N3_DEVICE double mass_left(double w) {
    if (!(w > 0)) return 0;
    double sum = law.total;
    if (dense) {
      sum = sweep(w, double(kInf32)).sum;
    } else {
      for (int32_t e = 0; e < a.entries; ++e) {
        if (shared.token[e] >= 0) sum += left_of(shared.p[e], w, shared.q[e]);
      }
    }
    return sum * (w / all);
  }

  // Of a dense law: what is left, tile by tile, until the running sum passes `wanted`; the tile is in shared memory
  // then.
  struct Sweep {
    double sum, before;  // with and without the last tile
    int32_t tile, last;  // -1: it does not pass; the last tile that weighs
  };
  N3_DEVICE Sweep sweep(double w, double wanted, int32_t until = -1) {
    Sweep s{0, 0, -1, -1};
    for (int32_t t = 0; t < a.tiles && s.tile < 0; ++t) {
      const double mass = fill_left(t, w);
      s.before = s.sum, s.sum += mass;
      if (mass > 0) s.last = t;
      if ((mass > 0 && s.sum > wanted) || t == until) s.tile = t;
    }
    return s;
  }

  N3_DEVICE int32_t draw_dense(double u_final, double w) {
    double wanted = double(kInf32);
    int32_t until = -1;
    for (;;) {
      const Sweep s = sweep(w, wanted, until);
      if (s.tile >= 0) return law.pick({s.tile, s.before, wanted});
      if (s.last < 0) return -1;
      wanted = u_final * s.sum, until = s.last;
    }
  }

  // A draw from what is left of row i, from p where nothing is, or where `rejected` is not.
  N3_DEVICE void put_final(int32_t i, double w, bool rejected) {
    const double u_final = final_uniform(c, int64_t(u.first) + i, seed, pos + i);
    int32_t token = -1;
    if (rejected && dense) token = draw_dense(u_final, w);
    for (bool left = rejected && !dense; token < 0; left = false) {
      __syncthreads();
      const int32_t e = int32_t(threadIdx.x);
      if (e < a.entries) shared.own[e] = left ? left_of(shared.p[e], w, shared.q[e]) : shared.p[e];
      __syncthreads();
      token = law.draw(u_final, 1.);
    }
    put(i, token, law.logprob(token, all));
    count = i + 1;
  }

  N3_DEVICE void put_draft(int32_t i, double p) { put(i, draft(i), law.only >= 0 ? 0. : log(p)), count = i + 1; }

  // ---- modes

  // Token: up to the first rejection. Block: u of a draft is compared with what is left of the row behind it.
  N3_DEVICE void by_laws() {
    const bool block = c.mode == VerifyMode::kBlock;
    double w = 1, w_tau = 1, u_last = 0;  // u of the draft before, 0 for none
    int32_t tau = 0, at = -1, final_row = chain.count ? -1 : 0;
    for (int32_t i = 0;;) {
      if (i != at) look(i), at = i;
      if (i == final_row) return put_final(i, w_tau, i < chain.count);
      if (block) {
        const double above = i ? mass_left(w) : 0., rest = above + 1 - w;
        if (u_last < (i == 0 || !(rest > 0) ? 1. : above / rest)) tau = i, w_tau = w;
      }
      const Ratio r = ratio(i);
      u_last = accept_uniform(c, int64_t(u.first) + i, seed, pos + i);
      if (block) w = r.q > 0 ? fmin(1., w * r.p / r.q) : 0.;
      const bool goes_on = block ? w > 0 : r.p > 0 && r.q > 0 && u_last * r.q < r.p;
      if (goes_on) put_draft(i, r.p);
      if (goes_on && i + 1 < chain.count) {
        ++i;
      } else if (goes_on && (!block || u_last < w)) {  // all of them are accepted
        if (chain.ends) return;
        i = final_row = chain.count, w_tau = 1;
      } else {
        i = final_row = block ? tau : i;
      }
    }
  }

  // Tokens of the row before this one: larger, or equal and of a lower id.
  N3_DEVICE double rank_of(int32_t token, float x) {
    if (law.only >= 0) return token != law.only;
    double before = 0;
    for (int32_t sub = warp_id(); sub < a.subs; sub += kDrawWarps) {
      if (!(a.maxima[int64_t(law.unit) * a.subs + sub] >= x)) continue;
      float v[kSubFloats];
      load_sub<T>(a, law.v, sub, v, law.stage);
#pragma unroll
      for (int j = 0; j < kSubFloats; ++j) {
        before += v[j] > x || (v[j] == x && sub * int32_t(kSub) + place_of(j) < token);
      }
    }
    return sum_of_block<kDrawWarps>(before, shared.sums);
  }

  N3_DEVICE double entropy() const {
    if (law.only >= 0) return 0;
    double sum = 0;
    for (int32_t t = lane_id(); t < a.tiles; t += 32) {
      const float most = tile_top(a, law.unit, t);
      if (!(most > -kInf32) || !(law.top < kInf32)) continue;
      const int64_t at = int64_t(law.unit) * a.tiles + t;
      sum += relative(most, law.top, law.inverse) * (a.heats[at] + a.masses[at] * law.z(most));
    }
    return log(all) - sum_of_warp(sum) / all;
  }

  // Among the most probable and near the best; by typicality otherwise.
  N3_DEVICE bool is_near(int32_t i, double p) {
    if (c.mode == VerifyMode::kTypical) return p > fmin(c.typical_epsilon, c.typical_delta * exp(-entropy()));
    const float x = law.only < 0 ? a.gathered[int64_t(law.unit) * a.entries] : 0.f;
    return p > 0 && p >= 1 / all - c.relaxed_delta && rank_of(draft(i), x) < double(c.relaxed_top_k);
  }

  N3_DEVICE void by_nearness() {
    for (int32_t i = 0; i < chain.count + !chain.ends; ++i) {
      look(i);
      const double p = i < chain.count && known(i) ? shared.p[0] / all : -1.;
      if (p >= 0 && is_near(i, p)) {
        put_draft(i, p);
        continue;
      }
      Emitted32 e;
      if (c.mode == VerifyMode::kTypical) {
        e = law.emit(seed, pos + i);
      } else {
        e.token = law.only >= 0 ? law.only : law.best_token();
        e.logprob = law.logprob(e.token, all);
      }
      put(i, e.token, e.logprob), count = i + 1;
      return;
    }
  }

  N3_DEVICE void run(int32_t request) {
    u = locate(a, request * a.width);
    if (u.live) {
      chain = chain_of(a, c, u), seed = a.seed[u.slot], pos = c.pos[request];
      if constexpr (kLossy) {
        by_nearness();
      } else {
        by_laws();
      }
    }
    __syncthreads();  // what was put behind the last token has been written
    finish(a, c, u, count, flags, int32_t(threadIdx.x), kDrawThreads);
  }
};

//   grid  requests     block  kDrawThreads     dynamic smem  a sub-tile of floats per warp where there are biases
// `drafts`: the drafters' logits with their records; without logits: laws are lists, or certain.
template <typename T, bool kLossy>
__global__ __launch_bounds__(kDrawThreads, 2) void verify_kernel(const RowArgs a, const RowArgs drafts,
                                                                 const ColumnMap columns, const VerifyArgs c) {
  __shared__ DrawShared shared;
  hopper::wait_for_previous();
  Verifier<T, kLossy> verifier(a, drafts, columns, c, shared);
  verifier.run(int32_t(blockIdx.x));
}

}  // namespace n3::mtp
