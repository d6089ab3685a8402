// mtp_verify_tree: a block walks from the root to accepted children, and draws one token more. Rules in
// n3kernels/mtp/verify_tree.py.
//
// The rows' records hold all weights. Of the rows on the path alone the tiles with tokens that a q may take away from
// are summed again without them: 1 minus a sum would cancel on a peaked row.
#pragma once
#include "chain.cuh"
#include "draw.cuh"

namespace n3::mtp {

template <typename T>
struct TreeWalker {
  const RowArgs& a;
  const TreeArgs& c;
  DrawShared& shared;
  Unit u;
  int64_t seed, pos;
  int32_t depth;
  Law<T> law;
  uint32_t flags;
  double all, factor, outside;  // the sum of the row's weights; p = factor * weight of what is not apart, and their sum

  N3_DEVICE TreeWalker(const RowArgs& rows, const TreeArgs& call, DrawShared& s)
      : a(rows), c(call), shared(s), depth(0), law(rows, s), flags(0), all(1), factor(1), outside(0) {}

  N3_DEVICE int32_t token_of(int32_t node) const { return c.drafts[u.first + node]; }

  // Calls f(child, its number among its siblings) in order until it returns true. By whole warps, alike in all.
  template <typename F>
  N3_DEVICE void each_child(int32_t node, F f) {
    if (depth + 1 == c.width) return;
    int32_t number = 0;
    for (int32_t start = node + 1; start < u.rows; start += 32) {
      const int32_t j = start + lane_id();
      uint32_t hits = __ballot_sync(kAll, j < u.rows && c.parents[u.first + j] == node && token_of(j) >= 0);
      for (; hits; hits &= hits - 1) {
        if (f(start + __ffs(hits) - 1, number++)) return;
      }
    }
  }

  N3_DEVICE void put(int32_t node, int32_t token, double logprob) {
    if (threadIdx.x != 0) return;
    const int64_t at = int64_t(u.request) * c.width + depth;
    c.tokens[at] = token, c.path[at] = u.first + node, c.logprobs[at] = float(logprob);
  }

  // ---- the target's own token, and the first child that has it

  struct Step {
    int32_t token, child;  // -1: none has it
  };

  N3_DEVICE Step follow(int32_t node) {
    const Emitted32 e = law.emit(seed, pos + depth);
    put(node, e.token, e.logprob);
    int32_t child = -1;
    each_child(node, [&](int32_t j, int32_t) {
      if (token_of(j) >= a.vocab) flags |= kOutOfRange;
      if (child < 0 && token_of(j) == e.token) child = j;
      return false;
    });
    return {e.token, child};
  }

  // ---- siblings

  // The tokens that the laws of the children may take away from, and q of listed ones; -1 behind. A node with more than
  // kMostApart children that are certain has no more of them.
  N3_DEVICE void list_apart(int32_t node) {
    const int32_t e = int32_t(threadIdx.x);
    const int64_t row = int64_t(u.first) + node;
    __syncthreads();
    shared.token[e] = -1, shared.q[e] = 0;
    __syncthreads();
    int32_t count = 0;
    each_child(node, [&](int32_t j, int32_t number) {
      if (number < kMostApart && e == number && !c.laws.ids && token_of(j) < a.vocab) shared.token[e] = token_of(j);
      ++count;
      return c.laws.ids != nullptr || count >= kMostApart;
    });
    if (count && c.laws.ids && e < c.laws.entries) {
      int32_t token = c.laws.ids[row * c.laws.entries + e];
      if (c.laws.map && token >= 0) token = token < c.laws.mapped ? c.laws.map[token] : -1;
      const double own = c.laws.probs[row * c.laws.entries + e];
      shared.token[e] = token < a.vocab ? token : -1, shared.q[e] = own > 0 ? own : 0.;
    }
    __syncthreads();
    const int32_t token = shared.token[e];
    bool again = false;
    double whole = 0;
    for (int32_t f = 0; f < kMostApart; ++f) {
      if (shared.token[f] == token) again |= f < e, whole += shared.q[f];
    }
    __syncthreads();
    if (again) shared.token[e] = -1;
    shared.q[e] = whole;
    if (e == 0) shared.apart = kMostApart;
    __syncthreads();
  }

  // Sums the tiles of these tokens again, without them; their weights go to `p` and `own`, as probabilities.
  N3_DEVICE void set_apart() {
    if (law.only >= 0) {
      shared.p[threadIdx.x] = shared.token[threadIdx.x] == law.only;
    } else {
      shared.p[threadIdx.x] = 0;
    }
    for (int32_t e = 0; e < kMostApart && law.only < 0; ++e) {
      const int32_t tile = shared.token[e] >= 0 ? shared.token[e] / int32_t(kTile) : -1;
      bool done = tile < 0;
      for (int32_t f = 0; f < e && !done; ++f) done = shared.token[f] >= 0 && shared.token[f] / int32_t(kTile) == tile;
      if (!done) leave_out(tile);
    }
    __syncthreads();
    if (law.only < 0) {
      double sum = 0;
      for (int32_t t = lane_id(); t < a.tiles; t += 32) sum += law.tile_mass(t);
      law.total = sum_of_warp(sum);
    }
    double held = 0;
    for (int32_t e = 0; e < kMostApart; ++e) held += shared.p[e];
    if (law.only >= 0 && held > 0) law.total = 0;
    all = law.total + held, factor = 1 / all, outside = law.total * factor;
    shared.own[threadIdx.x] = shared.p[threadIdx.x] * factor;
    __syncthreads();
  }

  N3_DEVICE void leave_out(int32_t tile) {
    law.fill_weights(tile, [](int32_t, double w) { return w; });
    const int32_t token = shared.token[threadIdx.x];
    if (token >= 0 && token / int32_t(kTile) == tile) {
      double& w = shared.weights[law.slot_of(token - tile * int32_t(kTile))];
      shared.p[threadIdx.x] = w, w = 0;
    }
    __syncthreads();
    double sum = 0;
    for (int32_t i = threadIdx.x; i < int32_t(kTile); i += kDrawThreads) sum += shared.weights[law.slot_of(i)];
    sum = sum_of_block<kDrawWarps>(sum, shared.sums);
    const double up = relative(tile_top(a, law.unit, tile), law.top, law.inverse);
    if (threadIdx.x == 0) a.masses[int64_t(law.unit) * a.tiles + tile] = up > 0 ? sum / up : 0.;
  }

  N3_DEVICE int32_t entry_of(int32_t token) const {
    for (int32_t e = 0; e < kMostApart; ++e) {
      if (shared.token[e] == token) return e;
    }
    return -1;
  }

  // p becomes norm(max(p - q, 0)), if anything is left.
  N3_DEVICE void take_away(int32_t certain) {
    const int32_t e = int32_t(threadIdx.x);
    const double q = c.laws.ids ? shared.q[e] : e == certain;
    __syncthreads();
    const double before = shared.own[e];
    shared.own[e] = fmax(before - q, 0.);
    __syncthreads();
    double sum = outside;
    for (int32_t f = 0; f < kMostApart; ++f) sum += shared.own[f];
    __syncthreads();
    shared.own[e] = sum > 0 ? shared.own[e] / sum : before;
    if (sum > 0) outside /= sum, factor /= sum;
    __syncthreads();
  }

  // The first child that is accepted; none: the token is drawn from what is left.
  N3_DEVICE Step sibling(int32_t node) {
    list_apart(node);
    set_apart();
    Step step{-1, -1};
    each_child(node, [&](int32_t j, int32_t number) {
      const int32_t draft = token_of(j), e = draft < a.vocab ? entry_of(draft) : -1;
      if (draft >= a.vocab) {
        flags |= kOutOfRange;
        return false;
      }
      const double q = e < 0 ? 0. : c.laws.ids ? shared.q[e] : 1.;
      if (!(q > 0 && q < double(kInf32))) {
        if (c.laws.ids) flags |= kNotDrawn;
        return false;
      }
      const double u_accept = accept_uniform(c, int64_t(u.first) + j, seed, pos + depth, 1 + number);
      const double p = shared.own[e];
      if (p > 0 && u_accept * q < p) {
        step = {draft, j};
        return true;
      }
      take_away(e);
      return false;
    });
    if (step.child < 0) {
      step.token = law.draw(final_uniform(c, int64_t(u.first) + node, seed, pos + depth), factor);
    }
    put(node, step.token, law.logprob(step.token, all));
    return step;
  }

  template <bool kByToken>
  N3_DEVICE void run(int32_t request) {
    u = {request, 0, clamp_to(a.cu_rows[request], a.rows), 0, a.slot ? a.slot[request] : request, false};
    u.rows = clamp_to(a.cu_rows[request + 1], a.rows) - u.first;
    // A row has one request: where offsets do not ascend, it is the last one's.
    u.live = u.slot >= 0 && u.slot < a.slots && u.rows > 0 && request_of(a, u.first) == request;
    int32_t count = 0;
    if (u.live) {
      seed = a.seed[u.slot], pos = c.pos[request];
      for (int32_t node = 0; node >= 0; ++depth, ++count) {
        Unit at = u;
        at.i = node;
        law.open(at, u.first + node);
        flags |= law.flags;
        const Step step = kByToken ? sibling(node) : follow(node);
        node = is_eos(c, step.token) ? -1 : step.child;
      }
    }
    __syncthreads();
    const int64_t at = int64_t(request) * c.width;
    for (int32_t i = count + int32_t(threadIdx.x); i < c.width; i += kDrawThreads) {
      c.tokens[at + i] = c.path[at + i] = -1, c.logprobs[at + i] = 0.f;
    }
    if (threadIdx.x != 0) return;
    c.num_emitted[request] = count;
    c.flags[request] = int32_t(flags | (u.slot >= a.slots ? kOutOfRange : 0));
  }
};

//   grid  requests     block  kDrawThreads     dynamic smem  a sub-tile of floats per warp where there are biases
template <typename T, bool kByToken>
__global__ __launch_bounds__(kDrawThreads, 2) void tree_kernel(const RowArgs a, const TreeArgs c) {
  __shared__ DrawShared shared;
  hopper::wait_for_previous();
  TreeWalker<T> walker(a, c, shared);
  walker.template run<kByToken>(int32_t(blockIdx.x));
}

}  // namespace n3::mtp
