// q of a drafter's logits: the softmax of a row over its columns, each of which is a token, or stands for one. Its
// records are those of a row without edits.
#pragma once
#include "columns_kernel.cuh"

namespace n3::mtp {

struct DenseLaw {
  static constexpr int32_t kNone = -1, kNoToken = 0x7fffffff;

  const RowArgs& a;
  const ColumnMap& map;
  int64_t row;
  int32_t only;  // the certain token; kNoToken: a column is certain that stands for none
  float top;
  double inverse, total;
  Scale2 scale;

  N3_DEVICE float logit(int32_t column) const {
    const int64_t at = row * a.stride + column;
    float x;
    switch (a.type) {
      case 0: x = static_cast<const float*>(a.logits)[at]; break;
      case 1: x = device::widen(static_cast<const device::F16*>(a.logits)[at]); break;
      default: x = device::widen(static_cast<const device::BF16*>(a.logits)[at]);
    }
    return x == x ? x : -kInf32;
  }

  // By a whole warp. Of a cold row, and of one that is infinite, the first of the largest is certain.
  N3_DEVICE void open(const Unit& u, int32_t unit) {
    row = u.row(), only = kNone, inverse = 1, total = 0;
    top = row_top(a, unit);
    const float temperature = temperature_of(a, u.slot);
    if (!is_sampled(a, u.slot) || top == kInf32 || top == -kInf32) {
      only = token_of(first_of_top(unit));
      return;
    }
    scale = scale_of(temperature), inverse = 1. / temperature;
    for (int32_t t = lane_id(); t < a.tiles; t += 32) {
      const float most = tile_top(a, unit, t);
      if (most > -kInf32) total += a.masses[int64_t(unit) * a.tiles + t] * relative(most, top, inverse);
    }
    total = sum_of_warp(total);
  }

  N3_DEVICE int32_t token_of(int32_t column) const {
    const int32_t token = map.tokens ? map.tokens[column] : column;
    return token >= 0 ? token : kNoToken;
  }

  N3_DEVICE int32_t first_of_top(int32_t unit) const {
    if (top == -kInf32) return 0;
    for (int32_t sub = 0; sub < a.subs; ++sub) {
      if (a.maxima[int64_t(unit) * a.subs + sub] != top) continue;
      for (int32_t column = sub * int32_t(kSub) + lane_id();; column += 32) {
        const uint32_t hits = __ballot_sync(kAll, column < a.vocab && logit(column) == top);
        if (hits) return column - lane_id() + __ffs(hits) - 1;
      }
    }
    return 0;
  }

  // Of a token of the target's vocabulary.
  N3_DEVICE double of(int32_t token) const {
    if (only != kNone) return token == only;
    if (!map.tokens) return weight(scale, logit(token), top) / total;
    double sum = 0;
    for (int32_t column = map.first[token]; column >= 0; column = map.next[column]) {
      sum += weight(scale, logit(column), top);
    }
    return sum / total;
  }
};

}  // namespace n3::mtp
