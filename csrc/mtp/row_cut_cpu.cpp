// The lowest logit that min-p, top-k and top-p keep.
#include "row.h"

#include <algorithm>

namespace n3::mtp {

void Row::cut(int64_t slot) {
  temperature_ = std::min(value_or(rows_.temperature, slot, 1.f), kMost);
  scale_.best = best_, scale_.cut = -kInfinity;
  scale_.high = float(1 / temperature_), scale_.low = float(1 / temperature_ - scale_.high);
  sparse_ = false;
  if (best_ == kInfinity) {  // its equals share the mass
    scale_.best = kMost, scale_.cut = kInfinity;
    return collect(kInfinity);
  }
  const float min_p = value_or(rows_.min_p, slot, 0.f);
  if (min_p > 0) {
    const double least = best_ + temperature_ * std::log(std::min<double>(min_p, 1));
    scale_.cut = float(least);
    if (scale_.cut < least) scale_.cut = std::nextafter(scale_.cut, kInfinity);
  }
  const int64_t k = value_or(rows_.top_k, slot, 0);
  if (k > 0 && k < rows_.vocab) {
    cut_top_k(k);
  } else if (min_p > 0) {
    collect(scale_.cut);
  }
  const float top_p = value_or(rows_.top_p, slot, 1.f);
  if (top_p < 1) cut_top_p(top_p);
}

// The k-th largest maximum of a sub-tile bounds the k-th largest logit from below.
void Row::cut_top_k(int64_t k) {
  float bound = -kMost;
  if (k <= subs()) {
    order_ = maxima_;
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
    bound = order_[k - 1];
  } else if (16 * k < rows_.vocab) {
    bound = guess_bound(k);
  }
  collect(std::max(bound, scale_.cut));
  if (count_ < k && bound > scale_.cut) collect(std::max(-kMost, scale_.cut));  // a wrong guess
  if (count_ < k) return;  // min-p leaves fewer, or there are fewer above -inf
  order_.assign(values_.get(), values_.get() + count_);
  std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
  cut_candidates(order_[k - 1]);
}

// What some more than k logits reach, to judge by one in 32 of them.
float Row::guess_bound(int64_t k) {
  order_.clear();
  for (int64_t s = 0; (s + 1) * kSub <= rows_.vocab; ++s) {
    const float* x = load(s * kSub, kBlock);
    order_.insert(order_.end(), x, x + kBlock);
  }
  for (float& x : order_) x = x == x ? x : -kInfinity;
  const int64_t rank = k * int64_t(order_.size()) / rows_.vocab * 5 / 4 + 16;
  if (rank >= int64_t(order_.size())) return -kMost;
  std::nth_element(order_.begin(), order_.begin() + rank, order_.end(), std::greater<float>());
  return std::max(order_[rank], -kMost);
}

void Row::cut_candidates(float least) {
  scale_.cut = std::max(scale_.cut, least);
  int64_t kept = 0;
  for (int64_t i = 0; i < count_; ++i) {
    const float x = values_[i];
    values_[kept] = x, ids_[kept] = ids_[i];
    kept += x >= least;
  }
  count_ = kept;
}

void Row::cut_top_p(float top_p) {
  double total;
  const bool dense = !sparse_;
  if (dense) {
    apart_.clear();
    weigh_dense();
    total = total_;
    // Most of the mass lies near the best; where it does not, everything is looked at.
    collect(float(std::max<double>(best_ - 8 * temperature_, -kMost)));
    std::fill(values_.get() + count_, values_.get() + padded(count_), -kInfinity);
    if (kernels_.mass(scale_, values_.get(), padded(count_)) < top_p * total) collect(-kMost);
    weigh();
  } else {
    weigh();
    total = total_;
  }
  cut_candidates(select(top_p * total));
}

// The candidate at which the mass from the largest on reaches `share`; of equals all count at once. Masses are added
// up in bins, and but one bin's members are looked at again.
float Row::select(double share) {
  constexpr int64_t kBins = 1024, kFew = 1024, kLast = kBins - 1;
  const float *x = values_.get(), *w = weights_.get();
  int64_t n = count_;
  double before = 0, high = best_, low = best_ - 32 * temperature_;  // below lies next to nothing
  bool first = true;
  while (n > kFew) {
    if (!first) {
      const auto [least, most] = std::minmax_element(x, x + n);
      if (*least == *most) return *least;
      high = *most, low = *least;
    }
    const double scale = kLast / (high - low);
    const auto bin = [&](float v) { return std::min(int64_t(std::min((high - v) * scale, 2. * kLast)), kLast); };
    double bins[2][kBins] = {};  // neighbours take turns: they often meet in one bin
    for (int64_t i = 0; i < n; ++i) bins[i & 1][bin(x[i])] += w[i];
    int64_t at = 0;
    for (; at < kLast; ++at) {
      const double mass = bins[0][at] + bins[1][at];
      if (!(before + mass < share)) break;
      before += mass;
    }
    next_.resize(n), next_weight_.resize(n);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      next_[kept] = x[i], next_weight_[kept] = w[i];
      kept += bin(x[i]) == at;
    }
    next_.swap(order_), next_weight_.swap(order_weight_);
    x = order_.data(), w = order_weight_.data(), n = kept, first = false;
  }
  chosen_.clear();
  for (int64_t i = 0; i < n; ++i) chosen_.push_back({x[i], w[i]});
  std::stable_sort(chosen_.begin(), chosen_.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (int64_t i = 0; i < n;) {
    const float value = chosen_[i].first;
    for (; i < n && chosen_[i].first == value; ++i) before += chosen_[i].second;
    if (!(before < share) || i == n) return value;
  }
  return -kMost;
}

}  // namespace n3::mtp
