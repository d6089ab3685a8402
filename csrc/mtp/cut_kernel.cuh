// The cut of min-p, top-k and top-p: the lowest logit that stays, and what the tiles' masses are then.
//
// A first bound comes from the records (the k-th largest maximum of a sub-tile bounds the k-th largest logit, most of
// the mass lies within 8 temperatures of the best), sub-tiles that reach it are looked through for the logits at and
// above it, and these, in shared memory where there is room, are bisected by their keys: integers all the way, so that
// equal logits stay together. Each warp has its own tiles and looks at its logits in their order: every sum has one
// order.
#pragma once
#include "rows.cuh"

namespace n3::mtp {

constexpr int kCutWarps = kCutThreads / 32;
constexpr int kCutRoom = 896;  // logits of a warp; with a sub-tile for each that is below 48 KiB

struct CutShared {
  float logits[kCutWarps][kCutRoom];
  double sums[kCutWarps];
  float over[kCutWarps], under[kCutWarps];
  uint32_t words[kCutWarps];
};

// What lies at and above a bound: how much, and the logits next to the bound on both sides.
struct Measure {
  double sum;
  float over, under;
};

template <typename T>
struct Cutter {
  const RowArgs& a;
  const RowView v;
  CutShared& shared;
  float* stage;
  int32_t unit;
  float top;
  Scale2 scale;
  float low;        // of the logits that are looked at
  int32_t count;    // in this warp's room, where `stored`
  bool stored;

  // Calls f with the logits of this lane that are not below `bound`, sub-tile by sub-tile of this warp's tiles, and
  // with others; f is called by whole warps.
  template <typename F>
  N3_DEVICE void read(float bound, F f) {
#pragma unroll 1
    for (int32_t tile = warp_id(); tile < a.tiles; tile += kCutWarps) {
#pragma unroll 1
      for (int32_t sub = tile * kTileSubs; sub < (tile + 1) * kTileSubs && sub < a.subs; ++sub) {
        if (!(a.maxima[int64_t(unit) * a.subs + sub] >= bound)) continue;
        float x[kSubFloats];
        load_sub<T>(a, v, sub, x, stage);
        f(x);
      }
    }
  }

  // From here on only logits >= bound count.
  N3_DEVICE void collect(float bound) {
    low = bound, count = 0;
    bool full = false;
    read(bound, [&](const float (&x)[kSubFloats]) {
#pragma unroll
      for (int j = 0; j < kSubFloats; ++j) {
        const uint32_t hits = __ballot_sync(kAll, x[j] >= bound);
        const int32_t place = count + __popc(hits & ((1u << lane_id()) - 1));
        if (x[j] >= bound && place < kCutRoom) shared.logits[warp_id()][place] = x[j];
        count += __popc(hits), full |= count > kCutRoom;
      }
    });
    stored = over_block<kCutWarps>(uint32_t(full), shared.words, [](uint32_t p, uint32_t q) { return p | q; }) == 0;
  }

  template <typename F>
  N3_DEVICE void each(F f) {
    if (stored) {
      for (int32_t i = lane_id(); i < count; i += 32) f(shared.logits[warp_id()][i]);
    } else {
      read(low, [&](const float (&x)[kSubFloats]) {
#pragma unroll
        for (int j = 0; j < kSubFloats; ++j) {
          if (x[j] >= low) f(x[j]);
        }
      });
    }
  }

  // `all` calls its argument with this thread's numbers; each weighs `worth` of it.
  template <typename All, typename Worth>
  N3_DEVICE Measure measure(float bound, All all, Worth worth) {
    Measure m{0, kInf32, -kInf32};
    all([&](float x) {
      if (x >= bound) {
        m.sum += worth(x), m.over = fminf(m.over, x);
      } else {
        m.under = fmaxf(m.under, x);
      }
    });
    m.sum = sum_of_block<kCutWarps>(m.sum, shared.sums);
    m.over = -max_of_block<kCutWarps>(-m.over, shared.over) + 0.f;  // of two zeros one
    m.under = max_of_block<kCutWarps>(m.under, shared.under) + 0.f;
    return m;
  }

  // The highest bound, from `from` on, at and above which they are worth `wanted`: there they are.
  template <typename All, typename Worth>
  N3_DEVICE float highest(float from, double wanted, All all, Worth worth) {
    int32_t below = key_of(from + 0.f), above = key_of(top + 0.f);
    while (below < above) {
      const int32_t middle = middle_of(below, above);
      const Measure m = measure(value_of(middle), all, worth);
      if (m.sum >= wanted) {
        below = key_of(m.over);
      } else {
        above = key_of(m.under);
      }
    }
    return value_of(below);
  }

  N3_DEVICE double mass_of_records(double inverse) {
    double mass = 0;
    for (int32_t t = lane_id(); t < a.tiles; t += 32) {
      const float tops = tile_top(a, unit, t);
      if (tops > -kInf32) mass += a.masses[int64_t(unit) * a.tiles + t] * relative(tops, top, inverse);
    }
    return sum_of_warp(mass);
  }

  N3_DEVICE void cut_top_k(int32_t k, float least) {
    const auto one = [](float) { return 1.; };
    const float* maxima = a.maxima + int64_t(unit) * a.subs;
    const auto every = [&](auto f) {
      for (int32_t s = threadIdx.x; s < a.subs; s += kCutThreads) f(maxima[s]);
    };
    float bound = least;
    if (k <= a.subs && measure(least, every, one).sum >= k) bound = highest(least, k, every, one);
    collect(bound);
    const auto logits = [&](auto f) { each(f); };
    if (measure(bound, logits, one).sum >= k) low = highest(bound, k, logits, one);
  }

  N3_DEVICE void cut_top_p(float share, bool cut_before, double inverse, float temperature) {
    const auto logits = [&](auto f) { each(f); };
    const auto worth = [&](float x) { return double(weight(scale, x, top)); };
    double wanted = 0;
    if (cut_before) {
      wanted = double(share) * measure(low, logits, worth).sum;
    } else {
      wanted = double(share) * mass_of_records(inverse);
      collect(fmaxf(float(double(top) - 8. * temperature), kLowest));
      if (!(measure(low, logits, worth).sum >= wanted)) {
        collect(kLowest);
        wanted = double(share) * measure(low, logits, worth).sum;
      }
    }
    low = highest(low, wanted, logits, worth);
  }

  // The masses of what stays, outside the support of the draft's law.
  N3_DEVICE void weigh_again(int64_t row, double inverse) {
#pragma unroll 1
    for (int32_t tile = warp_id(); tile < a.tiles; tile += kCutWarps) {
      const float most = tile_top(a, unit, tile);
      double mass = 0, heat = 0;
#pragma unroll 1
      for (int32_t sub = tile * kTileSubs; sub < (tile + 1) * kTileSubs && sub < a.subs; ++sub) {
        if (!(a.maxima[int64_t(unit) * a.subs + sub] >= low)) continue;
        float x[kSubFloats];
        load_sub<T>(a, v, sub, x, stage);
        if (a.apart) leave_out(row, sub * int32_t(kSub), x);
#pragma unroll
        for (int j = 0; j < kSubFloats; ++j) {
          if (!(x[j] >= low)) continue;
          const float w = weight(scale, x[j], most);
          mass += w;
          if (a.heats && x[j] != most) heat += w * ((double(x[j]) - double(most)) * inverse);
        }
      }
      mass = sum_of_warp(mass);
      if (a.heats) heat = sum_of_warp(heat);
      if (lane_id() != 0) continue;
      a.masses[int64_t(unit) * a.tiles + tile] = mass;
      if (a.heats) a.heats[int64_t(unit) * a.tiles + tile] = heat;
    }
  }

  N3_DEVICE void leave_out(int64_t row, int32_t begin, float (&x)[kSubFloats]) {
    for (int32_t start = 0; start < a.entries; start += 32) {
      const int32_t e = start + lane_id();
      const int32_t token = e < a.entries ? law_token(a, row, e) : -1;
      uint32_t hits = __ballot_sync(kAll, token >= begin && token < begin + int32_t(kSub));
      for (; hits; hits &= hits - 1) {
        const int32_t place = __shfl_sync(kAll, token, __ffs(hits) - 1) - begin;
#pragma unroll
        for (int j = 0; j < kSubFloats; ++j) x[j] = place == place_of(j) ? -kInf32 : x[j];
      }
    }
  }
};

//   grid  units     block  kCutThreads     dynamic smem  a sub-tile of floats per warp where there are biases
template <typename T>
__global__ __launch_bounds__(kCutThreads, 2) void cut_kernel(const RowArgs a) {
  __shared__ CutShared shared;
  hopper::wait_for_previous();
  hopper::let_next_start();
  const int32_t unit = int32_t(blockIdx.x);
  const Unit u = locate(a, unit);
  if (!u.live || forced_token(a, u.row()) >= 0 || !is_sampled(a, u.slot) || !is_cut(a, u.slot)) return;
  const float top = row_top(a, unit);
  if (top == -kInf32) return;
  RowView v = view_of<T>(a, u.row());
  if (a.flags[int64_t(unit) * a.tiles] & kEmptyMask) v.mask = nullptr;
  const float temperature = temperature_of(a, u.slot);
  const double inverse = 1. / temperature;
  float* stage = reinterpret_cast<float*>(hopper::shared_memory()) + warp_id() * int32_t(kSub);
  Cutter<T> cutter{a, v, shared, stage, unit, top, scale_of(temperature), kLowest, 0, false};
  if (top == kInf32) {  // its equals share the mass
    cutter.low = top;
  } else {
    const float min_p = a.min_p ? a.min_p[u.slot] : 0.f, top_p = a.top_p ? a.top_p[u.slot] : 1.f;
    const int32_t k = a.top_k ? a.top_k[u.slot] : 0;
    const bool by_min_p = min_p > 0, by_top_k = k > 0 && k < a.vocab;
    const float least = by_min_p ? fmaxf(least_kept(top, temperature, min_p), cutter.low) : cutter.low;
    if (by_top_k) {
      cutter.cut_top_k(k, least);
    } else if (by_min_p && top_p < 1) {
      cutter.collect(least);
    }
    if (!by_top_k) cutter.low = least;
    if (top_p < 1) cutter.cut_top_p(top_p, by_top_k || by_min_p, inverse, temperature);
  }
  if (threadIdx.x == 0) a.cuts[unit] = cutter.low;
  __syncthreads();  // the records were read
  cutter.weigh_again(u.row(), inverse);
}

}  // namespace n3::mtp
