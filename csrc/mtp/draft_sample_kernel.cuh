// mtp_draft_sample: the most probable tokens of a row, their law and a draw from it. Formulas in
// n3kernels/mtp/draft_sample.py.
//
// The m-th largest logit is found as a cut is; larger ones are listed in any order, of its equals the lowest tokens,
// for which sub-tiles are counted first. No more than 63 sub-tiles hold larger ones, and 64 of the others hold enough
// equals.
#pragma once
#include "cut_kernel.cuh"

namespace n3::mtp {

constexpr int kDraftSubs = 2 * kMaxDraftIds;

struct DraftShared {
  CutShared cut;
  int32_t subs[kDraftSubs], equals[kDraftSubs];  // that are looked at, and how many of their logits are at the cut
  int32_t count, above;
  float logits[kMaxDraftIds];
  int32_t ids[kMaxDraftIds];
  double weights[kMaxDraftIds];
  int32_t order[kMaxDraftIds];
};

// Lists, in ascending order, the sub-tiles with something above `low` and as many others with an equal as may matter.
N3_DEVICE void list_subs(const RowArgs& a, int32_t unit, float low, DraftShared& s) {
  if (warp_id() != 0) return;
  const float* maxima = a.maxima + int64_t(unit) * a.subs;
  int32_t count = 0, equal = 0;
  for (int32_t start = 0; start < a.subs; start += 32) {
    const int32_t sub = start + lane_id();
    const float most = sub < a.subs ? maxima[sub] : -kInf32;
    const uint32_t before = (1u << lane_id()) - 1, equals = __ballot_sync(kAll, most == low);
    const bool wanted = most > low || (most == low && equal + __popc(equals & before) < int32_t(kMaxDraftIds));
    const uint32_t hits = __ballot_sync(kAll, wanted);
    const int32_t place = count + __popc(hits & before);
    if (wanted && place < kDraftSubs) s.subs[place] = sub;
    count += __popc(hits), equal += __popc(equals);
  }
  if (lane_id() == 0) s.count = count < kDraftSubs ? count : kDraftSubs, s.above = 0;
}

// The m largest logits to shared memory, unordered; their number. `cutter.low` is the m-th largest.
template <typename T>
N3_DEVICE int32_t list_largest(Cutter<T>& cutter, int32_t m, DraftShared& s) {
  const float low = cutter.low;
  list_subs(cutter.a, cutter.unit, low, s);
  __syncthreads();
  float x[kSubFloats];
  for (int32_t i = warp_id(); i < s.count; i += kCutWarps) {
    load_sub<T>(cutter.a, cutter.v, s.subs[i], x, cutter.stage);
    int32_t equals = 0;
#pragma unroll
    for (int j = 0; j < kSubFloats; ++j) {
      equals += __popc(__ballot_sync(kAll, x[j] == low));
      if (!(x[j] > low)) continue;
      const int32_t at = atomicAdd(&s.above, 1);
      if (at < m) s.logits[at] = x[j], s.ids[at] = s.subs[i] * int32_t(kSub) + place_of(j);
    }
    if (lane_id() == 0) s.equals[i] = equals;
  }
  __syncthreads();
  const int32_t above = s.above;
  int32_t all = above;
  for (int32_t i = 0; i < s.count; ++i) {
    const int32_t begin = all;
    all += s.equals[i];
    if (i % kCutWarps != warp_id() || begin >= m || s.equals[i] == 0) continue;
    load_sub<T>(cutter.a, cutter.v, s.subs[i], x, cutter.stage);
    int32_t at = begin;
#pragma unroll
    for (int c = 0; c < kSubFloats; c += kVector) {
      int32_t mine = 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) mine += x[c + e] == low;
      int32_t through = mine;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int32_t other = __shfl_up_sync(kAll, through, by);
        if (lane_id() >= by) through += other;
      }
      int32_t place = at + through - mine;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (x[c + e] != low) continue;
        if (place < m) s.logits[place] = low, s.ids[place] = s.subs[i] * int32_t(kSub) + place_of(c + e);
        ++place;
      }
      at += __shfl_sync(kAll, through, 31);
    }
  }
  __syncthreads();
  return all < m ? all : m;
}

// The law of the listed tokens in descending order, and the draw. By the block; thread 0 adds up.
N3_DEVICE void publish(const RowArgs& a, const DraftSampleArgs& out, const Unit& u, int32_t count, DraftShared& s) {
  const int32_t i = int32_t(threadIdx.x);
  const float temperature = a.temperature ? a.temperature[u.slot] : 1.f;
  if (i < count) {
    int32_t rank = 0;
    for (int32_t j = 0; j < count; ++j) {
      rank += s.logits[j] > s.logits[i] || (s.logits[j] == s.logits[i] && s.ids[j] < s.ids[i]);
    }
    s.order[rank] = i;
  }
  __syncthreads();
  const float most = count ? s.logits[s.order[0]] : -kInf32;
  if (i < count) s.weights[i] = exp((double(s.logits[s.order[i]]) - double(most)) / double(temperature));
  __syncthreads();
  if (i != 0) return;
  int32_t* ids = out.ids + u.row() * out.max_ids;
  float* probs = out.probs + u.row() * out.max_ids;
  int32_t kept = 1;
  if (count == 0 || is_cold(temperature) || most == kInf32) {
    ids[0] = count ? s.ids[s.order[0]] : 0, probs[0] = 1.f;
  } else {
    double total = 0;
    for (kept = 0; kept < count && s.weights[kept] > 0; ++kept) total += s.weights[kept];
    for (int32_t j = 0; j < kept; ++j) ids[j] = s.ids[s.order[j]], probs[j] = float(s.weights[j] / total);
  }
  for (int32_t j = kept; j < out.max_ids; ++j) ids[j] = -1, probs[j] = 0.f;
  double total = 0, running = 0;
  for (int32_t j = 0; j < kept; ++j) total += probs[j];
  const double wanted = uniform53(a.seed[u.slot], out.pos[u.request], kDraft) * total;
  int32_t drawn = 0;
  for (; drawn < kept - 1; ++drawn) {
    running += probs[drawn];
    if (running > wanted) break;
  }
  out.tokens[u.row()] = out.map ? out.map[ids[drawn]] : ids[drawn];
}

//   grid  rows     block  kCutThreads
template <typename T>
__global__ __launch_bounds__(kCutThreads, 2) void draft_sample_kernel(const RowArgs a, const DraftSampleArgs out) {
  __shared__ DraftShared shared;
  hopper::wait_for_previous();
  const int32_t unit = int32_t(blockIdx.x);
  const Unit u = locate(a, unit);
  if (!u.live) {
    const int32_t i = int32_t(threadIdx.x);
    if (i >= out.max_ids) return;
    out.ids[int64_t(unit) * out.max_ids + i] = -1, out.probs[int64_t(unit) * out.max_ids + i] = 0.f;
    if (i == 0) out.tokens[unit] = -1;
    return;
  }
  const float top = row_top(a, unit);
  int32_t count = 0;
  if (top > -kInf32) {
    Cutter<T> cutter{a, view_of<T>(a, u.row()), shared.cut, nullptr, unit, top, scale_of(1.f), 0.f, 0, false};
    const int32_t m = out.max_ids < a.vocab ? out.max_ids : a.vocab;
    cutter.cut_top_k(m, kLowest);
    count = list_largest(cutter, m, shared);
  }
  publish(a, out, u, count, shared);
}

}  // namespace n3::mtp
