// Routing and its gradient by vectors of N3_LANES; see lanes.h.
//
// Sigmoid without groups, the usual case: scores of all experts are estimated in float32; from the estimates follows a
// threshold that the top_k must reach, error bounds included, and only what reaches it (some 28 experts of 512 for
// top_k 22) is computed in float64 and ranked. The estimates decide nothing: the result is that of the definition.
// Softmax and groups need every score, and every score is exact there.
#pragma once
#include "../common/lanes64.h"
#include "route_kernels.h"

namespace n3::moe_route {
namespace {

constexpr int kColumns = 64;  // what a row is folded to for the threshold
constexpr int kFew = 64;      // candidates that are ranked at once; more are narrowed to top_k first
constexpr int kSums = 16;     // a row is summed in so many interleaved partial sums, whatever the vectors' length
constexpr int kRoom = (kMaxExperts + kColumns - 1) / kColumns * kColumns;
constexpr float kNan = __builtin_nanf(""), kInfinity = __builtin_inff();

// What is known of the row at hand; expert by expert and padded to whole columns unless said otherwise.
struct Scratch {
  alignas(64) float choice[kRoom];  // or its estimate; NaN marks what cannot be chosen
  alignas(64) float score[kRoom];
  alignas(64) double power[kRoom];
  alignas(64) int32_t key[kRoom];        // of candidates or groups, one behind the other
  alignas(64) int32_t candidate[kRoom];  // experts, ascending
  alignas(64) int32_t kept[kRoom];       // 0 or 1
  alignas(64) int64_t ranked[kRoom];
};

// ---- orders

// Integers in the order of the floats, -0 with 0. NaN is mapped to -inf before.
constexpr int32_t kLowest = -0x7f800001;  // the key of -inf

N3_LANE_FN I32 keys(F32 v) {
  const I32 bits = (I32)(v + 0.f);
  return bits ^ (I32)((U32)(bits >> 31) >> 1);
}

N3_LANE_FN float value_of(int32_t key) { return bits_float(uint32_t(key ^ int32_t(uint32_t(key >> 31) >> 1))); }

N3_LANE_FN F32 usable(F32 v) { return v == v ? v : splat(-kInfinity); }

// One bit per lane of a comparison's result.
N3_LANE_FN uint32_t lane_bits(I32 v) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  if constexpr (kLanes == 16) return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes == 8) return uint32_t(_mm256_movemask_ps((__m256)v));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(v[i] & 1) << i;
  return bits;
}

N3_LANE_FN int32_t lane_sum(I32 v) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// How many of n keys, padded with INT32_MIN to whole vectors, are at least `least`.
N3_LANE_FN int count_from(const int32_t* key, int n, int32_t least) {
  I32 count{};
  for (int i = 0; i < n; i += kLanes) {
    I32 v;
    std::memcpy(&v, key + i, sizeof v);
    count -= v >= least;
  }
  return lane_sum(count);
}

struct Bound {
  int32_t least;
  int count;  // keys of at least that, k or more
};

// Bisects for the largest bound that k keys reach, and stops early where at most k + spare do.
N3_LANE_FN Bound bound(const int32_t* key, int n, int k, int spare) {
  I32 low, high;
  std::memcpy(&low, key, sizeof low);
  high = low;
  for (int i = kLanes; i < n; i += kLanes) {
    I32 v;
    std::memcpy(&v, key + i, sizeof v);
    low = v < low ? v : low, high = v > high ? v : high;
  }
  int64_t reached = low[0], beyond = high[0];
  for (int i = 1; i < kLanes; ++i) {
    reached = low[i] < reached ? low[i] : reached;
    beyond = high[i] > beyond ? high[i] : beyond;
  }
  reached = reached < kLowest ? kLowest : reached;  // the padding is no key
  beyond += 1;
  int count = n;
  while (count > k + spare && beyond - reached > 1) {
    const int64_t middle = reached + (beyond - reached) / 2;
    const int from = count_from(key, n, int32_t(middle));
    if (from >= k) {
      reached = middle, count = from;
    } else {
      beyond = middle;
    }
  }
  return {int32_t(reached), count};
}

N3_LANE_FN void pad(int32_t* key, int n) {
  for (int i = n; i % kLanes; ++i) key[i] = INT32_MIN;
}

// Keeps the k largest keys in `mark` (1 kept, 0 not), of equal ones the first. The keys are padded.
N3_LANE_FN void keep_largest(const int32_t* key, int n, int k, int32_t* mark) {
  const Bound b = bound(key, n, k, 0);
  int ties = k;  // that are kept
  if (b.count > k) ties -= count_from(key, n, b.least + 1);
  for (int i = 0; i < n; ++i) {
    const bool tie = b.count > k && key[i] == b.least;
    mark[i] = key[i] >= b.least && (!tie || ties > 0);
    ties -= tie;
  }
}

// ---- scores

N3_LANE_FN F64 low_half(F32 v) {
  HalfF32 half;
  std::memcpy(&half, &v, sizeof half);
  return __builtin_convertvector(half, F64);
}

N3_LANE_FN F64 high_half(F32 v) {
  HalfF32 half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof half, sizeof half);
  return __builtin_convertvector(half, F64);
}

N3_LANE_FN F32 join(F64 low, F64 high) {
  const HalfF32 a = __builtin_convertvector(low, HalfF32), b = __builtin_convertvector(high, HalfF32);
  F32 v;
  std::memcpy(&v, &a, sizeof a);
  std::memcpy(reinterpret_cast<char*>(&v) + sizeof a, &b, sizeof b);
  return v;
}

N3_LANE_FN F32 exact_sigmoid(F32 x) { return join(sigmoid(low_half(x)), sigmoid(high_half(x))); }

// Calls f(i, elements i to i + kLanes) over a row; what is beyond its end are the lanes of `beyond`.
template <typename T, typename F>
N3_LANE_FN void over_row(const T* row, int n, float beyond, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, load(row + i));
  if (i == n) return;
  T whole[kLanes];
  for (T& v : whole) v = from_float<T>(beyond);
  std::memcpy(whole, row + i, (n - i) * sizeof(T));
  f(i, load(whole));
}

// All scores of a row, 0 beyond its end.
template <typename T>
N3_LANE_FN void sigmoid_scores(const T* row, int n, Scratch& s) {
  over_row(row, n, -kInfinity, [&](int i, F32 x) { store(s.score + i, exact_sigmoid(x)); });
}

template <typename T>
N3_LANE_FN void softmax_scores(const T* row, int n, Scratch& s) {
  F32 top = splat(-kInfinity);
  over_row(row, n, -kInfinity, [&](int, F32 x) { top = max(x, top); });  // without the NaN
  float largest = top[0];
  for (int i = 1; i < kLanes; ++i) largest = top[i] > largest ? top[i] : largest;

  constexpr int kVectors = kSums / kLanes64;
  over_row(row, n, -kInfinity, [&](int i, F32 x) {
    const F64 low = exp(low_half(x) - double(largest)), high = exp(high_half(x) - double(largest));
    std::memcpy(s.power + i, &low, sizeof low);
    std::memcpy(s.power + i + kLanes64, &high, sizeof high);
  });
  for (int i = (n + kLanes - 1) / kLanes * kLanes; i % kSums; ++i) s.power[i] = 0;
  F64 sums[kVectors] = {};
  for (int i = 0; i < n; i += kSums) {
    for (int v = 0; v < kVectors; ++v) {
      F64 power;
      std::memcpy(&power, s.power + i + v * kLanes64, sizeof power);
      sums[v] += power;
    }
  }
  double total = 0;
  for (int i = 0; i < kSums; ++i) total += sums[i / kLanes64][i % kLanes64];
  for (int i = 0; i < n; i += kLanes64) {
    F64 power;
    std::memcpy(&power, s.power + i, sizeof power);
    store64(s.score + i, power / total);
  }
}

template <typename T>
N3_LANE_FN void scores(const Options& o, const T* row, Scratch& s) {
  return o.softmax ? softmax_scores(row, int(o.experts), s) : sigmoid_scores(row, int(o.experts), s);
}

// ---- choice

N3_LANE_FN F32 with_bias(F32 score, const float* bias, int i, int n) {
  if (!bias) return score;
  return score + (i + kLanes <= n ? load(bias + i) : load_part(bias + i, n - i));
}

N3_LANE_FN void store_choice(float* choice, F32 v, int i, int n) {
  store(choice + i, usable(v));
  for (int pad = n; pad < i + kLanes; ++pad) choice[pad] = kNan;
}

// The sigmoid to 2^-15. No fused multiply-adds, which are dear where the CPU has none.
N3_LANE_FN F32 rough_sigmoid(F32 x) {
  const F32 magic = splat(12582912.f), t = x * -1.44269504f;  // 1.5 * 2^23: adding it rounds to an integer
  const F32 inside = max(splat(-100.f), min(splat(100.f), t));
  const F32 shifted = inside + magic, f = inside - (shifted - magic);
  const F32 p = ((f * 0.05517167f + 0.24261113f) * f + 0.69326099f) * f + 0.99992807f;  // 2^f, least largest error
  const F32 power = (F32)(((U32)shifted << 23) + (127u << 23));  // 2^n: the bits above n are shifted out
  return 1.f / (p * power + 1.f);
}

// The estimates of a row's choices, off by less than slack() allows for; returns whether all logits are finite.
template <typename T>
N3_LANE_FN bool estimate(const T* row, int n, const float* bias, Scratch& s) {
  I32 bad{};
  over_row(row, n, 0.f, [&](int i, F32 x) {
    bad |= ((I32)x & 0x7f800000) == 0x7f800000;
    store_choice(s.choice, bias ? with_bias(rough_sigmoid(x), bias, i, n) : sigmoid(x), i, n);
  });
  return !lane_bits(bad);
}

// How far below a bound that top_k estimates reach a choice among the top_k may be estimated. Twice their error,
// rounded up: rough_sigmoid's, or where there is no bias 2^-21.2 of the score itself and, below e^-87, 2^-125.
N3_LANE_FN float slack(float bound, bool biased) {
  if (bound - bound != 0.f) return 0.f;  // infinite, as the choices then are
  return __builtin_fabsf(bound) * 0x1p-19f + (biased ? 0x1p-13f : 0x1p-120f);
}

// The sum of the two largest of n choices, of one the choice itself.
N3_LANE_FN float best_two(const float* choice, int n) {
  if (n == 1) return choice[0];
  F32 best = splat(-kInfinity), second = best;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 v = load(choice + i);
    second = max(min(v, best), second), best = max(v, best);
  }
  float first = -kInfinity, next = -kInfinity;
  const auto add = [&](float v) {
    const float low = v < first ? v : first;
    first = v > first ? v : first, next = low > next ? low : next;
  };
  if (i > 0) {
    for (int lane = 0; lane < kLanes; ++lane) add(best[lane]), add(second[lane]);
  }
  for (; i < n; ++i) add(choice[i]);
  return first + next;
}

// The exact choices of a row, those of groups that take no part marked.
N3_LANE_FN void choices(const Options& o, const float* bias, Scratch& s) {
  const int n = int(o.experts);
  for (int i = 0; i < n; i += kLanes) store_choice(s.choice, with_bias(load(s.score + i), bias, i, n), i, n);
  if (o.n_group == 1) return;
  const int groups = int(o.n_group), size = n / groups;
  for (int g = 0; g < groups; ++g) {
    const float sum = best_two(s.choice + g * size, size) + 0.f;
    const int32_t bits = int32_t(float_bits(sum));
    s.key[g] = sum == sum ? bits ^ int32_t(uint32_t(bits >> 31) >> 1) : kLowest;
  }
  pad(s.key, groups);
  keep_largest(s.key, groups, int(o.topk_group), s.kept);
  for (int g = 0; g < groups; ++g) {
    if (s.kept[g]) continue;
    for (int i = g * size; i < (g + 1) * size; ++i) s.choice[i] = kNan;
  }
}

// The experts whose choice reaches a threshold that top_k of them reach; returns how many they are. Element i of the
// row is in column i % kColumns; top_k columns' largest reach the threshold, so at least as many experts do.
N3_LANE_FN int find_candidates(const Options& o, bool estimated, bool biased, Scratch& s) {
  constexpr int kVectors = kColumns / kLanes;
  const int n = int(o.experts), k = int(o.top_k);
  for (int i = (n + kLanes - 1) / kLanes * kLanes; i % kColumns; ++i) s.choice[i] = kNan;
  F32 column[kVectors];
  for (F32& v : column) v = splat(-kInfinity);
  for (int i = 0; i < n; i += kColumns) {
    for (int v = 0; v < kVectors; ++v) column[v] = max(load(s.choice + i + v * kLanes), column[v]);
  }
  alignas(64) int32_t key[kColumns];
  for (int v = 0; v < kVectors; ++v) {
    const I32 largest = keys(column[v]);
    std::memcpy(key + v * kLanes, &largest, sizeof largest);
  }
  float least = value_of(bound(key, kColumns, k, 2).least);
  if (estimated) least -= slack(least, biased);

  int found = 0;
  for (int i = 0; i < n; i += kColumns) {
    uint64_t bits = 0;
    for (int v = 0; v < kVectors; ++v) {
      bits |= uint64_t(lane_bits(load(s.choice + i + v * kLanes) >= least)) << v * kLanes;
    }
    for (; bits; bits &= bits - 1) s.candidate[found++] = i + __builtin_ctzll(bits);
  }
  return found;
}

// ---- the row's result

// Candidates' scores and keys. Estimated: the scores first.
template <typename T>
N3_LANE_FN void value_candidates(const T* row, const float* bias, bool estimated, int found, Scratch& s) {
  for (int i = 0; i < found; i += kLanes) {
    const int count = found - i < kLanes ? found - i : kLanes;
    const int32_t* expert = s.candidate + i;
    F32 score{}, offset{};
    if (estimated) {
      T x[kLanes] = {};
      for (int j = 0; j < count; ++j) x[j] = row[expert[j]];
      score = exact_sigmoid(load(x));
      for (int j = 0; j < count; ++j) s.score[expert[j]] = score[j];
    } else {
      for (int j = 0; j < count; ++j) score[j] = s.score[expert[j]];
    }
    for (int j = 0; bias && j < count; ++j) offset[j] = bias[expert[j]];
    const I32 key = keys(usable(score + offset));
    std::memcpy(s.key + i, &key, sizeof key);
  }
  for (int i = found; i % kLanes; ++i) s.key[i] = INT32_MIN;
}

// Narrows the candidates to the top_k, in ascending order as they were.
N3_LANE_FN void narrow(int found, int k, Scratch& s) {
  keep_largest(s.key, found, k, s.kept);
  int next = 0;
  for (int i = 0; i < found; ++i) {
    const int32_t key = s.key[i], expert = s.candidate[i];
    s.key[next] = key, s.candidate[next] = expert;
    next += s.kept[i];
  }
}

// The candidates in descending order of choice, then ascending order of expert: s.ranked[r] ends in ~expert. A
// candidate's rank is the number of candidates before it.
N3_LANE_FN void rank(int found, Scratch& s) {
  alignas(64) int64_t key[kFew];
  for (int i = 0; i < found; ++i) {
    key[i] = int64_t(uint64_t(uint32_t(s.key[i])) << 32 | uint32_t(~s.candidate[i]));
  }
  for (int i = found; i % kLanes64; ++i) key[i] = INT64_MIN;
  for (int i = 0; i < found; i += kLanes64) {
    I64 mine, before{};
    std::memcpy(&mine, key + i, sizeof mine);
    for (int j = 0; j < found; ++j) before -= (key[j] + I64{}) > mine;
    for (int j = 0; j < kLanes64 && i + j < found; ++j) s.ranked[before[j]] = mine[j];
  }
}

N3_LANE_FN void write_row(const Options& o, const Rows& r, int64_t t, const Scratch& s) {
  const int k = int(o.top_k);
  int32_t* ids = r.ids + t * k;
  alignas(64) float chosen[kMaxTopK + kLanes] = {};
  float total = 0;
  for (int j = 0; j < k; ++j) {
    const int32_t expert = ~int32_t(uint32_t(uint64_t(s.ranked[j])));
    const float score = s.score[expert];
    chosen[j] = score == score ? score : 0.f;
    total += chosen[j];
    ++r.counts[expert];
    ids[j] = r.expert_map ? r.expert_map[expert] : expert;
  }
  total += 1e-20f;
  float* weights = r.weights + t * k;
  for (int j = 0; j < k; j += kLanes) {
    const F32 score = load(chosen + j);
    const F32 weight = (o.normalize ? score / total : score) * o.scale;
    k - j >= kLanes ? store(weights + j, weight) : store_part(weights + j, weight, k - j);
  }
}

template <typename T>
N3_LANE_FN bool finite(const T* row, int n) {
  I32 bad{};
  over_row(row, n, 0.f, [&](int, F32 x) { bad |= ((I32)x & 0x7f800000) == 0x7f800000; });
  return !lane_bits(bad);
}

template <typename T>
void forward(const Options& o, const Rows& r) {
  Scratch s;
  const bool estimated = !o.softmax && o.n_group == 1;
  for (int64_t t = 0; t < r.tokens; ++t) {
    const T* row = static_cast<const T*>(r.logits) + t * r.stride;
    if (estimated) {
      r.flags[t] = !estimate(row, int(o.experts), r.bias, s);
    } else {
      r.flags[t] = !finite(row, int(o.experts));
      scores(o, row, s);
      choices(o, r.bias, s);
    }
    int found = find_candidates(o, estimated, r.bias, s);
    value_candidates(row, r.bias, estimated, found, s);
    if (found > kFew) narrow(found, int(o.top_k), s), found = int(o.top_k);
    rank(found, s);
    write_row(o, r, t, s);
  }
}

// ---- the gradient

// g of the chosen experts, and their scores.
N3_LANE_FN void slot_gradients(const Options& o, const BackwardRows& r, int64_t t, const float* score, float* g) {
  const int k = int(o.top_k);
  float total = 1e-20f, dot = 0, sum = 0;
  for (int j = 0; j < k; ++j) {
    g[j] = r.grad[t * r.grad_strides[0] + j * r.grad_strides[1]] * o.scale;
    sum += score[j], dot += g[j] * score[j];
  }
  if (!o.normalize) return;
  total = sum + total;
  for (int j = 0; j < k; ++j) g[j] = (g[j] - dot / total) / total;
}

template <typename T>
N3_LANE_FN void store_row(T* out, int i, int n, F32 v) {
  n - i >= kLanes ? store(out + i, v) : store_part(out + i, v, n - i);
}

template <typename T>
void backward(const Options& o, const BackwardRows& r) {
  Scratch s;
  const int n = int(o.experts), k = int(o.top_k);
  for (int64_t t = 0; t < r.tokens; ++t) {
    const T* row = static_cast<const T*>(r.logits) + t * r.stride;
    T* out = static_cast<T*>(r.out) + t * n;
    const int32_t* ids = r.ids + t * k;
    alignas(64) float chosen[kMaxTopK + kLanes] = {}, g[kMaxTopK + kLanes] = {};
    if (o.softmax) {
      softmax_scores(row, n, s);
      for (int j = 0; j < k; ++j) chosen[j] = s.score[ids[j]];
    } else {
      for (int j = 0; j < k; ++j) chosen[j] = to_float(row[ids[j]]);
      for (int j = 0; j < k; j += kLanes) store(chosen + j, exact_sigmoid(load(chosen + j)));
    }
    for (int j = 0; j < k; ++j) chosen[j] = chosen[j] == chosen[j] ? chosen[j] : 0.f;
    slot_gradients(o, r, t, chosen, g);
    if (o.softmax) {
      float dot = 0;
      for (int j = 0; j < k; ++j) dot += g[j] * chosen[j];
      for (int i = 0; i < n; i += kLanes) {
        const F32 score = load(s.score + i);
        store_row(out, i, n, (score == score ? score : F32{}) * (0.f - dot));
      }
      for (int j = 0; j < k; ++j) out[ids[j]] = from_float<T>(chosen[j] * (g[j] - dot));
    } else {
      std::memset(static_cast<void*>(out), 0, n * sizeof(T));
      for (int j = 0; j < k; ++j) out[ids[j]] = from_float<T>(g[j] * chosen[j] * (1.f - chosen[j]));
    }
  }
}

constexpr Kernels kKernels = {{forward<float>, forward<Half>, forward<BFloat16>},
                              {backward<float>, backward<Half>, backward<BFloat16>}};

}  // namespace
}  // namespace n3::moe_route
