// The weights of a row's tokens and what is made of their sums.
#include "row.h"

#include <algorithm>

namespace n3::mtp {

// A row whose law is one token: forced, without support, or greedy. Its flags are set in any case.
bool Row::fixed(int64_t r, int64_t slot, bool greedy) {
  fixed_ = -1;
  const int64_t forced = value_or(rows_.forced, r, -1);
  if (forced >= 0 && forced < rows_.vocab) {
    flags_ = 0, fixed_ = int32_t(forced);
    return true;
  }
  open(r);
  if (forced >= rows_.vocab) flags_ |= kOutOfRange;
  scan();
  if (flags_ & kNoSupport) {
    fixed_ = lowest_allowed();
  } else if (greedy || is_greedy(value_or(rows_.temperature, slot, 1.f))) {
    fixed_ = best_token();
  }
  return fixed_ >= 0;
}

float Row::weight_of(float x) {
  alignas(64) float in[kBlock], out[kBlock];
  std::fill_n(in, kBlock, -kInfinity);
  in[0] = x;
  kernels_.weights(scale_, in, kBlock, out);
  return out[0];
}

// Candidates' weights and their sum.
void Row::weigh() {
  std::fill(values_.get() + count_, values_.get() + padded(count_), -kInfinity);
  kernels_.weights(scale_, values_.get(), padded(count_), weights_.get());
  total_ = 0;
  for (int64_t i = 0; i < count_; ++i) total_ += weights_[i];
}

bool Row::empty_tile(int64_t tile) const {
  const int64_t first = tile * (kTile / kSub), last = std::min(first + kTile / kSub, subs());
  for (int64_t s = first; s < last; ++s) {
    if (maxima_[s] > -kInfinity) return false;
  }
  return true;
}

std::pair<int64_t, int64_t> Row::candidates_of(int64_t tile) const {
  const int32_t* ids = ids_.get();
  const int64_t end = (tile + 1) * kTile;
  const auto* first = std::lower_bound(ids, ids + count_, tile * kTile);
  return {first - ids, std::lower_bound(first, ids + count_, end) - ids};
}

void Row::weigh_candidates() {
  if (fixed_ >= 0) {
    count_ = 1, ids_[0] = fixed_, values_[0] = 0, weights_[0] = 1;
  } else {
    weigh();
  }
  for (size_t a = 0; a < apart_.size(); ++a) {
    const auto* found = std::lower_bound(ids_.get(), ids_.get() + count_, apart_[a]);
    if (found == ids_.get() + count_ || *found != apart_[a]) continue;
    float& w = weights_[found - ids_.get()];
    apart_weight_[a] = w, w = 0;
  }
  std::fill(tiles_.begin(), tiles_.end(), 0.);
  for (int64_t i = 0; i < count_; ++i) tiles_[ids_[i] / kTile] += weights_[i];
}

void Row::weigh_dense() {
  for (size_t a = 0; a < apart_.size(); ++a) apart_weight_[a] = weight_of(value(apart_[a]));
  size_t next = 0;
  for (int64_t t = 0; t < tiles(); ++t) {
    const int64_t begin = t * kTile, n = tile_size(t);
    const size_t first = next;
    while (next < apart_.size() && apart_[next] < begin + n) ++next;
    tiles_[t] = 0;
    if (empty_tile(t)) continue;
    const float* x = next > first ? load_copy(begin, n) : load(begin, n);
    for (size_t a = first; a < next; ++a) tile_[apart_[a] - begin] = -kInfinity;
    tiles_[t] = kernels_.mass(scale_, x, padded(n));
  }
  outside_ = 0;
  for (const double t : tiles_) outside_ += t;
  total_ = outside_;
  for (size_t a = 0; a < apart_.size(); ++a) total_ += apart_weight_[a];
}

int32_t Row::law(int64_t r, int64_t slot, const std::vector<int32_t>& apart) {
  if (fixed(r, slot, false)) {
    sparse_ = true, scale_.best = 0, temperature_ = 1;
  } else {
    cut(slot);
  }
  apart_ = apart;
  apart_weight_.assign(apart.size(), 0);
  if (!sparse_) {
    weigh_dense();
  } else {
    weigh_candidates();
    outside_ = 0;
    for (const double t : tiles_) outside_ += t;
    total_ = outside_;
    for (const double w : apart_weight_) total_ += w;
  }
  return flags_;
}

double Row::p(int32_t token) {
  if (fixed_ >= 0) return token == fixed_;
  return weight_of(value(token)) / total_;
}

double Row::logprob(int32_t token) {
  if (fixed_ >= 0) return token == fixed_ ? 0 : -kInfinity;
  const float x = value(token);
  return x >= scale_.cut ? z(x) - std::log(total_) : -kInfinity;
}

int64_t Row::rank(int32_t token) {
  if (fixed_ >= 0) return token != fixed_;
  const float x = value(token);
  int64_t before = 0;
  for (int64_t s = 0; s < subs(); ++s) {
    if (!(maxima_[s] >= x)) continue;
    const int64_t begin = s * kSub, n = std::min(kSub, rows_.vocab - begin);
    const float* v = load(begin, n);
    for (int64_t i = 0; i < n; ++i) before += v[i] > x || (v[i] == x && begin + i < token);
  }
  return before;
}

double Row::entropy() {
  double sum = 0;
  for (int64_t t = 0; t < tiles(); ++t) over_tile(t, [&](int32_t, float x, float w) { sum += w * z(x); });
  return std::log(total_) - sum / total_;
}

}  // namespace n3::mtp
