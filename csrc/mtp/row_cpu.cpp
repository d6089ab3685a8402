// Reading a row: edits, sub-tiles' maxima, and the logits that reach a bound.
#include "row.h"

#include <algorithm>

#include "../common/element.h"

namespace n3::mtp {

Row::Row(const RowInputs& rows) : rows_(rows), kernels_(kernels()) {
  const int64_t room = padded(rows.vocab) + kBlock;
  tile_ = buffer<float>(4 * (kTile + kBlock));
  tile_weight_ = buffer<float>(4 * (kTile + kBlock));
  rivals_ = buffer<int32_t>(4 * kTile);
  values_ = buffer<float>(4 * room);
  weights_ = buffer<float>(4 * room);
  ids_ = buffer<int32_t>(4 * room);
  maxima_.resize(subs());
  tiles_.resize(tiles());
  ends_.resize(tiles());
}

void Row::read_edits(int64_t r) {
  edits_.clear();
  if (!rows_.bias_cu) return;
  const int64_t end = rows_.biases;
  const int64_t lo = std::clamp<int64_t>(rows_.bias_cu[r], 0, end);
  const int64_t hi = std::clamp<int64_t>(rows_.bias_cu[r + 1], 0, end);
  for (int64_t i = lo; i < hi; ++i) {
    const int32_t id = rows_.bias_ids[i];
    if (id >= 0 && id < rows_.vocab) edits_.push_back({id, rows_.bias_val[i]});
  }
  std::stable_sort(edits_.begin(), edits_.end(), [](const Edit& a, const Edit& b) { return a.id < b.id; });
}

void Row::open(int64_t r) {
  row_ = r, flags_ = 0, mask_ = nullptr;
  data_ = static_cast<const char*>(rows_.logits) + r * rows_.stride * element_size(Element(rows_.type));
  read_edits(r);
  const int64_t m = !rows_.bitmask ? -1 : value_or(rows_.bitmask_row, r, int32_t(r));
  if (m >= rows_.mask_rows && m >= 0) {
    flags_ |= kOutOfRange;
  } else if (m >= 0) {
    const int64_t words = (rows_.vocab + 31) / 32;
    mask_ = rows_.bitmask + m * words;
    if (lowest_allowed() == rows_.vocab) flags_ |= kEmptyMask, mask_ = nullptr;
  }
}

// vocab if there is none.
int32_t Row::lowest_allowed() const {
  if (!mask_) return 0;
  for (int64_t w = 0; 32 * w < rows_.vocab; ++w) {
    if (mask_[w]) return int32_t(std::min<int64_t>(32 * w + __builtin_ctz(uint32_t(mask_[w])), rows_.vocab));
  }
  return int32_t(rows_.vocab);
}

// Logits begin up to begin + n, edited, padded to whole blocks; `begin` is a multiple of 32. Floats without edits stay
// where they lie.
const float* Row::load(int64_t begin, int64_t n) {
  if (rows_.type == kFloat && n % kBlock == 0 && !mask_ && edits_.empty()) {
    return reinterpret_cast<const float*>(data_) + begin;
  }
  return load_copy(begin, n);
}

const float* Row::load_copy(int64_t begin, int64_t n) {
  float* x = tile_.get();
  kernels_.widen[rows_.type](data_ + begin * (rows_.type == kFloat ? 4 : 2), n, x);
  if (!edits_.empty()) {
    auto e = std::lower_bound(edits_.begin(), edits_.end(), begin, [](const Edit& a, int64_t id) { return a.id < id; });
    for (; e != edits_.end() && e->id < begin + n; ++e) x[e->id - begin] += e->value;
  }
  if (mask_) {
    const int64_t whole = n / 32;
    kernels_.mask(x, mask_ + begin / 32, whole);
    for (int64_t i = 32 * whole; i < n; ++i) {
      if (!(mask_[(begin + i) >> 5] >> (i & 31) & 1)) x[i] = -kInfinity;
    }
  }
  return x;
}

// One logit, edited; NaN as -inf.
float Row::value(int32_t token) {
  if (mask_ && !(mask_[token >> 5] >> (token & 31) & 1)) return -kInfinity;
  float x = logit_at(data_, rows_.type, token);
  auto e = std::lower_bound(edits_.begin(), edits_.end(), token, [](const Edit& a, int64_t id) { return a.id < id; });
  for (; e != edits_.end() && e->id == token; ++e) x += e->value;
  return x == x ? x : -kInfinity;
}

// Sub-tiles' maxima, the row's and its flags.
void Row::scan() {
  bool nan = false;
  const auto look = [&](int64_t sub) {
    const int64_t n = std::min(kSub, rows_.vocab - sub * kSub);
    maxima_[sub] = kernels_.largest(load(sub * kSub, n), padded(n), nan);
  };
  if (mask_) {
    for (int64_t s = 0; s < subs(); ++s) {
      const int64_t first = s * (kSub / 32), last = std::min<int64_t>(first + kSub / 32, (rows_.vocab + 31) / 32);
      const bool any = std::any_of(mask_ + first, mask_ + last, [](int32_t word) { return word != 0; });
      if (any) look(s);
      else maxima_[s] = -kInfinity;
    }
  } else {
    const int64_t whole = rows_.vocab / kSub;
    nan = kernels_.maxima[rows_.type](data_, whole, maxima_.data());
    if (whole < subs()) look(whole);
    int64_t done = -1;
    for (const Edit& e : edits_) {
      if (e.id / kSub != done) look(done = e.id / kSub);
    }
  }
  best_ = -kInfinity;
  for (const float m : maxima_) best_ = std::max(best_, m);
  flags_ |= nan * kNan | (best_ == -kInfinity) * kNoSupport;
}

int32_t Row::best_token() {
  if (fixed_ >= 0) return fixed_;
  const int64_t sub = std::find(maxima_.begin(), maxima_.end(), best_) - maxima_.begin();
  const int64_t n = std::min(kSub, rows_.vocab - sub * kSub);
  return int32_t(sub * kSub + kernels_.find(load(sub * kSub, n), padded(n), best_));
}

// Candidates: all logits >= bound, -inf excepted.
void Row::collect(float bound) {
  bound = std::max(bound, -kMost);
  count_ = 0;
  for (int64_t s = 0; s < subs(); ++s) {
    if (!(maxima_[s] >= bound)) continue;
    const int64_t n = std::min(kSub, rows_.vocab - s * kSub);
    count_ += kernels_.collect(load(s * kSub, n), padded(n), int32_t(s * kSub), bound, values_.get() + count_,
                               ids_.get() + count_);
  }
  sparse_ = true;
}

void Row::most_probable(int64_t r, int64_t m, std::vector<std::pair<float, int32_t>>& found) {
  fixed_ = -1;
  open(r);
  scan();
  found.clear();
  if (flags_ & kNoSupport) return;
  float bound = -kMost;
  if (m <= subs()) {
    order_ = maxima_;
    std::nth_element(order_.begin(), order_.begin() + (m - 1), order_.end(), std::greater<float>());
    bound = order_[m - 1];
  }
  collect(bound);
  for (int64_t i = 0; i < count_; ++i) found.push_back({values_[i], ids_[i]});
  const int64_t kept = std::min<int64_t>(m, count_);
  std::partial_sort(found.begin(), found.begin() + kept, found.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  found.resize(kept);
}

}  // namespace n3::mtp
