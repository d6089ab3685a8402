#include "row.h"

#include <algorithm>
#include <cfloat>

#include <torch/csrc/stable/ops.h>

#include "../common/element.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "row_lanes.h"

namespace n3::mtp {

const Kernels kGenericKernels = kKernels;

namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

constexpr float kMost = FLT_MAX;

}  // namespace

template <typename T>
Tensor Column<T>::dense(const Tensor& t) {
  return torch::stable::contiguous(t);
}
template class Column<float>;
template class Column<double>;
template class Column<int32_t>;
template class Column<int64_t>;

Rows::Rows(const Tensor& l, const SlotArgs& s, const EditArgs& e)
    : logits(l),
      data(static_cast<const char*>(l.const_data_ptr())),
      n(l.size(0)),
      vocab(l.size(1)),
      stride(l.stride(0) * element_size(l.scalar_type())),
      element(element_of(l.scalar_type())),
      slots(s.seed.size(0)),
      seed(s.seed),
      slot(s.slot),
      temperature(s.temperature),
      top_p(s.top_p),
      min_p(s.min_p),
      top_k(s.top_k),
      bitmask(e.bitmask),
      bitmask_row(e.bitmask_row),
      forced_token(e.forced_token),
      bias_ids(e.bias_ids),
      bias_cu(e.bias_cu),
      bias_val(e.bias_val),
      mask_rows(e.bitmask ? e.bitmask->size(0) : 0) {}

bool is_greedy(float temperature) { return !(temperature >= 1e-5f); }

Row::Row(const Rows& rows) : rows_(rows), kernels_(kernels()) {
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

// ---------------------------------------------------------------- reading

void Row::read_edits(int64_t r) {
  edits_.clear();
  if (!rows_.bias_cu) return;
  const int64_t end = rows_.bias_ids.size();
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
  data_ = rows_.data + r * rows_.stride;
  read_edits(r);
  const int64_t m = !rows_.bitmask ? -1 : rows_.bitmask_row.at(r, int32_t(r));
  if (m >= rows_.mask_rows && m >= 0) {
    flags_ |= kOutOfRange;
  } else if (m >= 0) {
    const int64_t words = (rows_.vocab + 31) / 32;
    mask_ = rows_.bitmask.data() + m * words;
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
  if (rows_.element == kFloat && n % kBlock == 0 && !mask_ && edits_.empty()) {
    return reinterpret_cast<const float*>(data_) + begin;
  }
  return load_copy(begin, n);
}

const float* Row::load_copy(int64_t begin, int64_t n) {
  float* x = tile_.get();
  kernels_.widen[rows_.element](data_ + begin * (rows_.element == kFloat ? 4 : 2), n, x);
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
  float x;
  switch (rows_.element) {
    case kFloat: x = reinterpret_cast<const float*>(data_)[token]; break;
    case kHalf: x = to_float(reinterpret_cast<const Half*>(data_)[token]); break;
    default: x = to_float(reinterpret_cast<const BFloat16*>(data_)[token]);
  }
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
      const int64_t first = s * (kSub / 32), last = std::min(first + kSub / 32, (rows_.vocab + 31) / 32);
      const bool any = std::any_of(mask_ + first, mask_ + last, [](int32_t word) { return word != 0; });
      if (any) look(s);
      else maxima_[s] = -kInfinity;
    }
  } else {
    const int64_t whole = rows_.vocab / kSub;
    nan = kernels_.maxima[rows_.element](data_, whole, maxima_.data());
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

// ---------------------------------------------------------------- filters

// A row whose law is one token: forced, without support, or greedy. Its flags are set in any case.
bool Row::fixed(int64_t r, int64_t slot, bool greedy) {
  fixed_ = -1;
  const int64_t forced = rows_.forced_token.at(r, -1);
  if (forced >= 0 && forced < rows_.vocab) {
    flags_ = 0, fixed_ = int32_t(forced);
    return true;
  }
  open(r);
  if (forced >= rows_.vocab) flags_ |= kOutOfRange;
  scan();
  if (flags_ & kNoSupport) {
    fixed_ = lowest_allowed();
  } else if (greedy || is_greedy(rows_.temperature.at(slot, 1.f))) {
    fixed_ = best_token();
  }
  return fixed_ >= 0;
}

void Row::cut(int64_t slot) {
  temperature_ = std::min(rows_.temperature.at(slot, 1.f), kMost);
  scale_.best = best_, scale_.cut = -kInfinity;
  scale_.high = float(1 / temperature_), scale_.low = float(1 / temperature_ - scale_.high);
  sparse_ = false;
  if (best_ == kInfinity) {  // its equals share the mass
    scale_.best = kMost, scale_.cut = kInfinity;
    return collect(kInfinity);
  }
  const float min_p = rows_.min_p.at(slot, 0.f);
  if (min_p > 0) {
    const double least = best_ + temperature_ * std::log(std::min<double>(min_p, 1));
    scale_.cut = float(least);
    if (scale_.cut < least) scale_.cut = std::nextafter(scale_.cut, kInfinity);
  }
  const int64_t k = rows_.top_k.at(slot, 0);
  if (k > 0 && k < rows_.vocab) {
    cut_top_k(k);
  } else if (min_p > 0) {
    collect(scale_.cut);
  }
  const float top_p = rows_.top_p.at(slot, 1.f);
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

// ---------------------------------------------------------------- weights

double Row::z(float x) const { return std::min(double(x) - scale_.best, 0.) / temperature_; }

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

// Calls f(token, logit, weight) for every token of a tile that weighs and is not set apart.
template <typename F>
void Row::over_tile(int64_t tile, F f) {
  if (sparse_) {
    const auto [first, last] = candidates_of(tile);
    for (int64_t i = first; i < last; ++i) {
      if (weights_[i] > 0) f(ids_[i], values_[i], weights_[i]);
    }
    return;
  }
  if (empty_tile(tile)) return;
  const int64_t begin = tile * kTile, n = tile_size(tile);
  const float* x = load(begin, n);
  float* w = tile_weight_.get();
  kernels_.weights(scale_, x, padded(n), w);
  for (auto a = std::lower_bound(apart_.begin(), apart_.end(), begin); a != apart_.end() && *a < begin + n; ++a) {
    w[*a - begin] = 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (w[i] > 0) f(int32_t(begin + i), x[i], w[i]);
  }
}

double Row::entropy() {
  double sum = 0;
  for (int64_t t = 0; t < tiles(); ++t) over_tile(t, [&](int32_t, float x, float w) { sum += w * z(x); });
  return std::log(total_) - sum / total_;
}

// ---------------------------------------------------------------- draws

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
