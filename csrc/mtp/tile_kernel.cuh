// The pass over the logits: what is kept of each tile of each row.
#pragma once
#include "rows.cuh"

namespace n3::mtp {

// Whether `v` holds in a thread of the block; `of_warp`: a word for each of the four warps, not in use.
N3_DEVICE bool any_of_block(bool v, uint32_t* of_warp) {
  const uint32_t votes = __ballot_sync(kAll, v);
  return over_block<kTileThreads / 32>(votes, of_warp, [](uint32_t a, uint32_t b) { return a | b; }) != 0;
}

// Whether the mask allows a token of words [first, first + count) of the row.
N3_DEVICE bool any_allowed(const RowView& v, int32_t first, int32_t count, uint32_t* of_warp) {
  bool any = false;
  for (int32_t start = 0; start < count && !any; start += 8 * kTileThreads) {
    bool mine = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int32_t w = start + i * kTileThreads + int32_t(threadIdx.x);
      mine |= w < count && mask_word(v, first + w) != 0;
    }
    any = any_of_block(mine, of_warp);
  }
  return any;
}

// Keeps the logits of the support of the draft's law that lie in this warp's two sub-tiles, and takes them out of x
// where `out`. Of equal entries the first gets the logit.
N3_DEVICE void take_support(const RowArgs& a, int32_t unit, int64_t row, int32_t begin, float (&x)[2][kSubFloats],
                            bool out) {
  for (int32_t start = 0; start < a.entries; start += 32) {
    const int32_t e = start + lane_id();
    const int32_t token = e < a.entries ? law_token(a, row, e) : -1;
    uint32_t hits = __ballot_sync(kAll, token >= begin && token < begin + 2 * int32_t(kSub));
    for (; hits; hits &= hits - 1) {
      const int from = __ffs(hits) - 1;
      const int32_t place = __shfl_sync(kAll, token, from) - begin;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int j = 0; j < kSubFloats; ++j) {
          if (place != s * int32_t(kSub) + place_of(j)) continue;
          a.gathered[int64_t(unit) * a.entries + start + from] = x[s][j];
          if (out) x[s][j] = -kInf32;
        }
      }
    }
  }
}

// Sums of the weights, relative to the tile's largest logit, and of weight times d / temperature. Float32 sums of eight
// at most (of what rounding lost: of all a thread has), the rest in float64.
struct TileSums {
  double mass, heat;
};

N3_DEVICE TileSums weigh(const float (&x)[2][kSubFloats], float top, const Scale2& scale, double inverse, bool heats) {
  TileSums sums{0, 0};
  float lost = 0.f;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int c = 0; c < kSubFloats; c += kVector) {
      float run = 0.f;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        float rest;
        const float p = power(scale, x[s][c + e] - top, rest);
        run += p, lost = fmaf(p, rest, lost);
      }
      sums.mass += run;
    }
  }
  sums.mass += lost * kLn2;
  if (!heats) return sums;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int c = 0; c < kSubFloats; c += kVector) {
      float run = 0.f, rest;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float d = fmaxf(x[s][c + e] - top, scale.least);
        run = fmaf(power(scale, d, rest), d, run);
      }
      sums.heat += run;
    }
  }
  sums.heat *= inverse;
  return sums;
}

//   grid  units * tiles     block  kTileThreads     dynamic smem  a tile of floats where there are biases
// A thread has 32 logits in registers, of which all loads are under way at once.
template <typename T>
__global__ __launch_bounds__(kTileThreads, 5) void tile_kernel(const RowArgs a) {
  __shared__ float tops[kTileThreads / 32];
  __shared__ double parts[kTileThreads / 32];
  __shared__ uint32_t words[kTileThreads / 32];
  hopper::wait_for_previous();
  hopper::let_next_start();
  const int32_t unit = int32_t(blockIdx.x) / a.tiles, tile = int32_t(blockIdx.x) % a.tiles;
  const Unit u = locate(a, unit);
  if (!u.live || forced_token(a, u.row()) >= 0) return;
  RowView v = view_of<T>(a, u.row());
  const int32_t begin = tile * int32_t(kTile) + warp_id() * 2 * int32_t(kSub);
  float x[2][kSubFloats];
  read_sub<T>(v, begin, x[0]);
  read_sub<T>(v, begin + int32_t(kSub), x[1]);

  uint32_t flags = 0;
  if (v.mask && !any_allowed(v, tile * int32_t(kTile) / 32, kTile / 32, words) &&
      !any_allowed(v, 0, (a.vocab + 31) / 32, words)) {
    flags = kEmptyMask, v.mask = nullptr;
  }
  float* stage = reinterpret_cast<float*>(hopper::shared_memory()) + warp_id() * 2 * int32_t(kSub);
  bool nan = false;
  float top = -kInf32;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float most = max_of_warp(edit_sub(a, v, begin + s * int32_t(kSub), x[s], stage, nan));
    const int32_t sub = begin / int32_t(kSub) + s;
    if (lane_id() == 0 && sub < a.subs) a.maxima[int64_t(unit) * a.subs + sub] = most;
    top = fmaxf(top, most);
  }
  if (any_of_block(nan, words)) flags |= kNan;
  if (threadIdx.x == 0) a.flags[int64_t(blockIdx.x)] = flags;
  if (!is_sampled(a, u.slot)) return;

  if (a.entries) take_support(a, unit, u.row(), begin, x, a.apart && !is_cut(a, u.slot));
  top = max_of_block<kTileThreads / 32>(top, tops);
  const float temperature = temperature_of(a, u.slot);
  TileSums sums{0, 0};
  if (top == kInf32) {
#pragma unroll
    for (int j = 0; j < kSubFloats; ++j) sums.mass += (x[0][j] == top) + (x[1][j] == top);
  } else if (top > -kInf32) {
    sums = weigh(x, top, scale_of(temperature), 1. / temperature, a.heats != nullptr);
  }
  sums.mass = sum_of_block<kTileThreads / 32>(sums.mass, parts);
  if (threadIdx.x == 0) a.masses[int64_t(blockIdx.x)] = sums.mass;
  if (!a.heats) return;
  sums.heat = sum_of_block<kTileThreads / 32>(sums.heat, parts);
  if (threadIdx.x == 0) a.heats[int64_t(blockIdx.x)] = sums.heat;
}

}  // namespace n3::mtp
