// How the GPU kernels on rows of logits run, and what they keep of a row: pure arithmetic of host and device.
#pragma once
#include "../common/numerics.h"
#include "plan.h"

namespace n3::mtp {

constexpr int kTileThreads = 128;  // a block per tile of a row, two sub-tiles for each warp
constexpr int kCutThreads = 256;   // a block per row
constexpr int kDrawThreads = 128;  // a block per row or request
constexpr int kSubFloats = kSub / 32;  // of a lane
constexpr int kTileSubs = kTile / kSub;

// The largest float32 number that the weights' arithmetic can divide by; above it all finite logits weigh the same.
constexpr float kHottest = 1e30f;

// One workspace for a call: the records of each unit, that is, of each row that a request may look at. At V = 131072 a
// unit has 1024 bytes of maxima, 256 of masses, 128 of flags, and as the mode needs it 256 of heats, 256 of logits.
struct Workspace {
  int64_t units, tiles, subs, entries;
  int64_t masses, heats, maxima, gathered, flags, cuts;  // where each begins, in bytes
  int64_t bytes;
};

inline Workspace workspace(int64_t units, int64_t vocab, int64_t entries, bool weighs, bool heats, bool cuts) {
  const int64_t tiles = (vocab + kTile - 1) / kTile, subs = (vocab + kSub - 1) / kSub;
  Workspace w{units, tiles, subs, entries, 0, 0, 0, 0, 0, 0, 0};
  const auto take = [&](int64_t count, int64_t size) {
    const int64_t begin = w.bytes;
    w.bytes += (units * count * size + 15) / 16 * 16;
    return begin;
  };
  w.masses = take(weighs ? tiles : 0, 8);
  w.heats = take(heats ? tiles : 0, 8);
  w.maxima = take(subs, 4);
  w.gathered = take(entries, 4);
  w.flags = take(tiles, 4);
  w.cuts = take(cuts ? 1 : 0, 4);
  return w;
}

// Keys of floats in the floats' order; of the zeros, 0 is to be given.
N3_HD int32_t key_of(float v) {
  const int32_t bits = int32_t(float_bits(v));
  return bits ^ (bits >> 31 & 0x7fffffff);
}
N3_HD float value_of(int32_t key) { return bits_float(uint32_t(key ^ (key >> 31 & 0x7fffffff))); }

// Between two keys, nearer to the upper one where there is no middle.
N3_HD int32_t middle_of(int32_t below, int32_t above) { return (below | above) - ((below ^ above) >> 1); }

// e^(d / temperature) as 2^h: 1 / temperature by log2(e) in two parts, and the d below which 2^h is 0.
struct Scale2 {
  float high, low, least;
};

N3_HD Scale2 scale_of(float temperature) {
  const double factor = 1.4426950408889634 / temperature;
  const float high = float(factor);
  return {high, float(factor - high), float(-200 / factor)};
}

N3_HD bool is_cold(float temperature) { return !(temperature >= 1e-5f); }  // greedy; NaN too

// The lowest logit that min-p keeps.
N3_HD float least_kept(float top, float temperature, float min_p) {
  const double least = top + double(temperature) * log(fmin(double(min_p), 1.));
  const float rounded = float(least);
  return rounded < least ? nextafterf(rounded, __builtin_inff()) : rounded;
}

}  // namespace n3::mtp
