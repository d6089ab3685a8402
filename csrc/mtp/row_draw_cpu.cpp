// Draws from a row: with Gumbel noise, and by the inverse distribution function.
#include "row.h"

#include <algorithm>

namespace n3::mtp {

Emitted Row::emit(int64_t r, int64_t slot, int64_t pos, bool greedy) {
  if (fixed(r, slot, greedy)) return {fixed_, 0.f, flags_};
  cut(slot);
  apart_.clear();
  if (sparse_) {
    weigh_candidates();
    total_ = 0;
    for (const double t : tiles_) total_ += t;
  } else {
    weigh_dense();
  }
  const int32_t token = coupled(rows_.seed[slot], pos);
  return {token, float(logprob(token)), flags_};
}

// argmax of log-weight + Gumbel noise: the tile by its mass, then the token inside it.
int32_t Row::coupled(int64_t seed, int64_t pos) {
  int64_t tile = 0;
  double most = -kInfinity;
  for (int64_t t = 0; t < tiles(); ++t) {
    if (!(tiles_[t] > 0)) continue;
    const double score = std::log(tiles_[t]) + gumbel(seed, pos, kTileNoise, t);
    if (score > most) most = score, tile = t;
  }
  int32_t token = -1;
  most = -kInfinity;
  const auto meet = [&](int32_t id, float x) {
    const double score = z(x) + gumbel(seed, pos, kTarget, id);
    if (score > most) most = score, token = id;
  };
  if (sparse_) {
    over_tile(tile, [&](int32_t id, float x, float) { meet(id, x); });
    return token;
  }
  const int64_t begin = tile * kTile, n = tile_size(tile);
  const float* x = load(begin, n);
  float* w = tile_weight_.get();
  kernels_.weights(scale_, x, padded(n), w);
  // Exponential variates of rate w: the least wins, and lies below 16 / mass but for one draw in e^16. What may lie
  // below that is found without logarithms, as -log(u) >= 1 - u.
  for (float limit = float(16 / tiles_[tile]); !(most > 1e-4 - std::log(limit)); limit = kInfinity) {
    const int64_t found = kernels_.rivals({seed, pos}, begin, w, padded(n), limit, rivals_.get());
    for (int64_t i = 0; i < found; ++i) meet(int32_t(begin + rivals_[i]), x[rivals_[i]]);
    if (limit == kInfinity) break;
  }
  return token;
}

int32_t Row::draw(double u, double factor, const std::vector<double>& own) {
  double sum = 0;
  size_t next = 0;
  int64_t last = -1;
  for (int64_t t = 0; t < tiles(); ++t) {
    double mass = factor * tiles_[t];
    for (; next < apart_.size() && apart_[next] < (t + 1) * kTile; ++next) mass += own[next];
    if (mass > 0) last = t;
    sum += mass;
    ends_[t] = sum;
  }
  if (last < 0) return -1;
  const double wanted = u * sum;
  int64_t tile = std::upper_bound(ends_.begin(), ends_.end(), wanted) - ends_.begin();
  if (tile == tiles()) tile = last;
  double running = tile ? ends_[tile - 1] : 0;
  int32_t hit = -1, latest = -1;
  auto a = std::lower_bound(apart_.begin(), apart_.end(), tile * kTile);
  const auto step = [&](int32_t id, double w) {
    if (!(w > 0) || hit >= 0) return;
    running += w, latest = id;
    if (running > wanted) hit = id;
  };
  const auto until = [&](int64_t id) {
    for (; a != apart_.end() && *a < id; ++a) step(*a, own[a - apart_.begin()]);
  };
  over_tile(tile, [&](int32_t id, float, float w) {
    until(id);
    step(id, factor * w);
  });
  until((tile + 1) * kTile);
  return hit >= 0 ? hit : latest;
}

double Row::excess(double factor, const double* q) {
  double sum = 0;
  for (int64_t t = 0; t < tiles(); ++t) {
    double mass = 0;
    over_tile(t, [&](int32_t id, float, float w) { mass += std::max(factor * w - q[id], 0.); });
    ends_[t] = sum += mass;
  }
  return sum;
}

int32_t Row::draw_excess(double u, double factor, const double* q) {
  const double sum = excess(factor, q);
  if (!(sum > 0)) return -1;
  const double wanted = u * sum;
  int64_t tile = std::upper_bound(ends_.begin(), ends_.end(), wanted) - ends_.begin();
  if (tile == tiles()) tile = std::lower_bound(ends_.begin(), ends_.end(), sum) - ends_.begin();
  double running = tile ? ends_[tile - 1] : 0;
  int32_t hit = -1, latest = -1;
  over_tile(tile, [&](int32_t id, float, float w) {
    const double left = factor * w - q[id];
    if (!(left > 0) || hit >= 0) return;
    running += left, latest = id;
    if (running > wanted) hit = id;
  });
  return hit >= 0 ? hit : latest;
}

}  // namespace n3::mtp
