// q of a drafter's logits: the softmax of a row over the whole vocabulary. Its records are those of a row without
// edits.
#pragma once
#include "rows.cuh"

namespace n3::mtp {

// Types of logits, for rows that are read one by one.
enum DenseType : int32_t { kDenseFloat, kDenseHalf, kDenseBFloat16 };

struct DenseLaw {
  const RowArgs& a;
  DenseType type;
  int64_t row;
  int32_t only;  // certain; -1: none is
  float top;
  double inverse, total;
  Scale2 scale;

  N3_DEVICE float logit(int32_t token) const {
    const int64_t at = row * a.stride + token;
    float x;
    switch (type) {
      case kDenseFloat: x = static_cast<const float*>(a.logits)[at]; break;
      case kDenseHalf: x = device::widen(static_cast<const device::F16*>(a.logits)[at]); break;
      default: x = device::widen(static_cast<const device::BF16*>(a.logits)[at]);
    }
    return x == x ? x : -kInf32;
  }

  // By a whole warp. Of a cold row, and of one that is infinite, the first of the largest is certain.
  N3_DEVICE void open(const Unit& u, int32_t unit) {
    row = u.row(), only = -1, inverse = 1, total = 0;
    top = row_top(a, unit);
    const float temperature = temperature_of(a, u.slot);
    if (!is_sampled(a, u.slot) || top == kInf32 || top == -kInf32) {
      only = first_of_top(unit);
      return;
    }
    scale = scale_of(temperature), inverse = 1. / temperature;
    for (int32_t t = lane_id(); t < a.tiles; t += 32) {
      const float most = tile_top(a, unit, t);
      if (most > -kInf32) total += a.masses[int64_t(unit) * a.tiles + t] * relative(most, top, inverse);
    }
    total = sum_of_warp(total);
  }

  N3_DEVICE int32_t first_of_top(int32_t unit) const {
    if (top == -kInf32) return 0;
    for (int32_t sub = 0; sub < a.subs; ++sub) {
      if (a.maxima[int64_t(unit) * a.subs + sub] != top) continue;
      for (int32_t token = sub * int32_t(kSub) + lane_id();; token += 32) {
        const uint32_t hits = __ballot_sync(kAll, token < a.vocab && logit(token) == top);
        if (hits) return token - lane_id() + __ffs(hits) - 1;
      }
    }
    return 0;
  }

  N3_DEVICE double of(int32_t token) const {
    if (only >= 0) return token == only;
    return weight(scale, logit(token), top) / total;
  }
};

}  // namespace n3::mtp
