// A row of logits on a GPU: where it lies, what is edited, what the records say. Rules in n3kernels/mtp/reference.py,
// the same in C++ in row.h.
//
// A unit is a row that a call may look at, row `unit % width` of request `unit / width`; with a width of 0 any row, of
// the request whose rows it is among; without requests unit, row and slot are one. A warp reads a row in sub-tiles of
// 512 logits, 16 in each lane.
#pragma once
#include "../common/hopper.cuh"
#include "inputs.h"
#include "random.h"
#include "rows_plan.h"

namespace n3::mtp {

constexpr float kInf32 = __builtin_inff(), kLowest = -3.402823466e38f;
constexpr uint32_t kAll = 0xffffffffu;

struct RowArgs : RowInputs {
  int32_t width, requests;
  const int32_t *cu_rows, *drafts;                // null: none; drafts end a chain
  const int32_t *law_tokens, *law_ids, *law_map;  // support of the drafts' laws: ids, or without them a token
  int32_t entries, mapped;                        // of it; 0: none
  int32_t tiles, subs;
  double *masses, *heats;  // null: not wanted
  float *maxima, *gathered, *cuts;
  uint32_t* flags;
  bool apart;                // the support's weights are kept out of the masses
  bool certain_at_infinity;  // of a row that reaches infinity the first such token is certain
};

// Lays the records of a call out in its workspace.
inline void lay_out(RowArgs& a, const Workspace& w, char* base, bool weighs, bool heats, bool cuts) {
  a.tiles = int32_t(w.tiles), a.subs = int32_t(w.subs);
  a.masses = weighs ? reinterpret_cast<double*>(base + w.masses) : nullptr;
  a.heats = heats ? reinterpret_cast<double*>(base + w.heats) : nullptr;
  a.maxima = reinterpret_cast<float*>(base + w.maxima);
  a.gathered = reinterpret_cast<float*>(base + w.gathered);
  a.flags = reinterpret_cast<uint32_t*>(base + w.flags);
  a.cuts = cuts ? reinterpret_cast<float*>(base + w.cuts) : nullptr;
}

// ---- warps and blocks

N3_DEVICE int lane_id() { return int(threadIdx.x % 32); }
N3_DEVICE int warp_id() { return int(threadIdx.x / 32); }

template <typename F>
N3_DEVICE double with_halves(double v, F f) {
  uint64_t bits;
  memcpy(&bits, &v, sizeof bits);
  bits = uint64_t(f(uint32_t(bits >> 32))) << 32 | f(uint32_t(bits));
  memcpy(&v, &bits, sizeof v);
  return v;
}

N3_DEVICE double shuffle_xor(double v, int by) {
  return with_halves(v, [by](uint32_t half) { return __shfl_xor_sync(kAll, half, by); });
}
N3_DEVICE double shuffle(double v, int from) {
  return with_halves(v, [from](uint32_t half) { return __shfl_sync(kAll, half, from); });
}

N3_DEVICE double sum_of_warp(double v) {
#pragma unroll
  for (int by = 16; by; by /= 2) v += shuffle_xor(v, by);
  return v;
}

// Over the lanes up to this one.
N3_DEVICE double sum_through(double v) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const double other = with_halves(v, [by](uint32_t half) { return __shfl_up_sync(kAll, half, by); });
    if (lane_id() >= by) v += other;
  }
  return v;
}

N3_DEVICE float max_of_warp(float v) {
#pragma unroll
  for (int by = 16; by; by /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, by));
  return v;
}
N3_DEVICE float min_of_warp(float v) { return -max_of_warp(-v); }

N3_DEVICE int32_t min_of_warp(int32_t v) {
#pragma unroll
  for (int by = 16; by; by /= 2) {
    const int32_t other = __shfl_xor_sync(kAll, v, by);
    v = other < v ? other : v;
  }
  return v;
}

N3_DEVICE uint32_t any_bits(uint32_t v) {
#pragma unroll
  for (int by = 16; by; by /= 2) v |= __shfl_xor_sync(kAll, v, by);
  return v;
}

// Over the warps of a block, in order, in every thread. `of_warp`: as many elements; barriers around its use are here.
template <int kWarps, typename T, typename F>
N3_DEVICE T over_block(T v, T* of_warp, F f) {
  __syncthreads();
  if (lane_id() == 0) of_warp[warp_id()] = v;
  __syncthreads();
  T all = of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) all = f(all, of_warp[w]);
  return all;
}
template <int kWarps>
N3_DEVICE double sum_of_block(double v, double* of_warp) {
  return over_block<kWarps>(sum_of_warp(v), of_warp, [](double a, double b) { return a + b; });
}
template <int kWarps>
N3_DEVICE float max_of_block(float v, float* of_warp) {
  return over_block<kWarps>(max_of_warp(v), of_warp, [](float a, float b) { return fmaxf(a, b); });
}

// ---- floats

N3_DEVICE float max_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
#else
  return a != a || b != b ? a + b : fmaxf(a, b);
#endif
}

N3_DEVICE float exp2_fast(float v) {
#if defined(__CUDACC__)
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
  return p;
#else
  return exp2f(v);
#endif
}

constexpr double kLn2 = 0.6931471805599453;

// 2^h of the formula, and by how much h was rounded.
N3_DEVICE float power(const Scale2& s, float d, float& lost) {
  d = fmaxf(d, s.least);
  const float h = d * s.high;
  lost = fmaf(d, s.low, fmaf(d, s.high, -h));
  return exp2_fast(h);
}

// e^((x - top) / temperature), 0 for -inf; infinities are equal.
N3_DEVICE float weight(const Scale2& s, float x, float top) {
  if (!(x > -kInf32)) return 0.f;
  float lost;
  const float p = power(s, x == top ? 0.f : x - top, lost);
  return fmaf(p, lost * float(kLn2), p);
}

// ---- rows

struct Unit {
  int32_t request, i, first, rows, slot;  // row i of the request, which has so many from the first on
  bool live;
  N3_DEVICE int64_t row() const { return int64_t(first) + i; }
};

N3_DEVICE int32_t clamp_to(int32_t v, int32_t most) { return v < 0 ? 0 : v < most ? v : most; }

// The last request that begins at or before a row, with ascending offsets. By a whole warp.
N3_DEVICE int32_t request_of(const RowArgs& a, int32_t row) {
  int32_t low = 0, count = a.requests;
  while (count > 1) {
    const int32_t step = (count + 31) / 32, at = lane_id() * step;
    const uint32_t begun = __ballot_sync(kAll, at < count && clamp_to(a.cu_rows[low + at], a.rows) <= row);
    const int32_t parts = begun ? 31 - __clz(int(begun)) : 0;
    low += parts * step, count = count - parts * step < step ? count - parts * step : step;
  }
  return low;
}

// By a whole warp.
N3_DEVICE Unit locate(const RowArgs& a, int32_t unit) {
  Unit u{unit, 0, unit, 1, 0, false};
  if (a.width) {
    u.request = unit / a.width, u.i = unit % a.width;
  } else {
    u.request = request_of(a, unit), u.i = unit - clamp_to(a.cu_rows[u.request], a.rows);
  }
  if (a.cu_rows) {
    u.first = clamp_to(a.cu_rows[u.request], a.rows);
    u.rows = clamp_to(a.cu_rows[u.request + 1], a.rows) - u.first;
  }
  u.slot = a.slot ? a.slot[u.request] : u.request;
  u.live = u.slot >= 0 && u.slot < a.slots && u.i >= 0 && u.i < u.rows;
  if (!a.drafts || !u.live) return u;
  bool ended = false;
  for (int32_t j = lane_id(); j < u.i; j += 32) ended |= a.drafts[u.first + j] < 0;
  u.live = __ballot_sync(kAll, ended) == 0;
  return u;
}

N3_DEVICE float temperature_of(const RowArgs& a, int32_t slot) {
  return a.temperature ? fminf(a.temperature[slot], kHottest) : 1.f;
}

N3_DEVICE bool is_sampled(const RowArgs& a, int32_t slot) {
  return a.masses && !(a.temperature && is_cold(a.temperature[slot]));
}

// Whether the row is cut by min-p, top-k or top-p.
N3_DEVICE bool is_cut(const RowArgs& a, int32_t slot) {
  return a.cuts && ((a.min_p && a.min_p[slot] > 0) || (a.top_p && a.top_p[slot] < 1) ||
                    (a.top_k && a.top_k[slot] > 0 && a.top_k[slot] < a.vocab));
}

// Negative: none.
N3_DEVICE int32_t forced_token(const RowArgs& a, int64_t row) {
  const int32_t token = a.forced ? a.forced[row] : -1;
  return token < a.vocab ? token : -1;
}

N3_DEVICE int32_t mask_row(const RowArgs& a, int64_t row) {
  const int32_t m = !a.bitmask ? -1 : a.bitmask_row ? a.bitmask_row[row] : int32_t(row);
  return m < a.mask_rows ? m : -1;
}

N3_DEVICE uint32_t range_flags(const RowArgs& a, int64_t row) {
  const bool past = (a.bitmask_row && a.bitmask_row[row] >= a.mask_rows) || (a.forced && a.forced[row] >= a.vocab);
  return past ? kOutOfRange : 0;
}

// Entry e of the support of the law of a row's draft: a token, -1 where it has none in the vocabulary.
N3_DEVICE int32_t law_token(const RowArgs& a, int64_t row, int32_t e) {
  int32_t token = a.law_ids ? a.law_ids[row * a.entries + e] : a.law_tokens[row];
  if (a.law_ids && a.law_map && token >= 0) token = token < a.mapped ? a.law_map[token] : -1;
  return token < a.vocab ? token : -1;
}

struct RowView {
  const char* data;
  const uint32_t* mask;  // null: every token is allowed
  int32_t vocab, first_bias, end_bias;
  bool aligned;
};

template <typename T>
N3_DEVICE RowView view_of(const RowArgs& a, int64_t row) {
  RowView v{};
  v.data = static_cast<const char*>(a.logits) + row * a.stride * int64_t(sizeof(T));
  const int32_t m = mask_row(a, row);
  if (m >= 0) v.mask = reinterpret_cast<const uint32_t*>(a.bitmask) + int64_t(m) * ((a.vocab + 31) / 32);
  v.vocab = a.vocab;
  if (a.bias_cu) v.first_bias = clamp_to(a.bias_cu[row], a.biases), v.end_bias = clamp_to(a.bias_cu[row + 1], a.biases);
  v.aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  return v;
}

// Word w of a row's mask, without the bits past the vocabulary.
N3_DEVICE uint32_t mask_word(const RowView& v, int32_t w) {
  const int32_t left = v.vocab - 32 * w;
  return left <= 0 ? 0 : left < 32 ? v.mask[w] & ((1u << left) - 1) : v.mask[w];
}

// ---- sub-tiles

constexpr int kVector = 8;

// Where in a sub-tile element j of this lane lies: lanes have neighbouring vectors, of every type of logits alike, so
// that sums do not depend on it.
N3_DEVICE int32_t place_of(int j) {
  return j / kVector * 32 * kVector + lane_id() * kVector + j % kVector;
}

N3_DEVICE void read_vector(const float* p, float* x) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // the sectors of the first load are in L1 for the second
    const float4 f = reinterpret_cast<const float4*>(p)[i];
    x[4 * i] = f.x, x[4 * i + 1] = f.y, x[4 * i + 2] = f.z, x[4 * i + 3] = f.w;
  }
}

template <typename T>
N3_DEVICE void read_vector(const T* p, float* x) {
  const uint4 u = device::load_once<uint4>(p);
  const uint32_t words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = device::widen(T{uint16_t(words[i])}), x[2 * i + 1] = device::widen(T{uint16_t(words[i] >> 16)});
  }
}

// As they lie in memory, -inf past the vocabulary.
template <typename T>
N3_DEVICE void read_sub(const RowView& v, int32_t begin, float (&x)[kSubFloats]) {
  const T* row = reinterpret_cast<const T*>(v.data);
  const bool whole = v.aligned && begin + int32_t(kSub) <= v.vocab;
#pragma unroll
  for (int c = 0; c < kSubFloats; c += kVector) {
    const int32_t at = begin + place_of(c);
    if (whole) {
      read_vector(row + at, x + c);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) x[c + e] = at + e < v.vocab ? device::widen(row[at + e]) : -kInf32;
    }
  }
}

// Adds the row's biases, those of one token in the order given. `stage`: a sub-tile of this warp's own.
N3_DEVICE void add_biases(const RowArgs& a, const RowView& v, int32_t begin, float (&x)[kSubFloats], float* stage) {
  bool staged = false;
#pragma unroll 1
  for (int32_t start = v.first_bias; start < v.end_bias; start += 32) {
    const int32_t at = start + lane_id();
    const int32_t place = at < v.end_bias ? a.bias_ids[at] - begin : -1;
    uint32_t hits = __ballot_sync(kAll, at < v.end_bias && a.bias_ids[at] >= 0 && a.bias_ids[at] < v.vocab &&
                                            place >= 0 && place < int32_t(kSub));
    if (hits && !staged) {
#pragma unroll
      for (int j = 0; j < kSubFloats; ++j) stage[place_of(j)] = x[j];
      staged = true;
      __syncwarp();
    }
    for (; hits; hits &= hits - 1) {
      if (lane_id() == __ffs(hits) - 1) stage[place] += a.bias_val[at];
      __syncwarp();
    }
  }
  if (!staged) return;
#pragma unroll
  for (int j = 0; j < kSubFloats; ++j) x[j] = stage[place_of(j)];
  __syncwarp();  // before it is written again
}

// Biases, mask, -inf for NaN: the lane's largest; `nan` is set where an allowed logit of the warp was one.
N3_DEVICE float edit_sub(const RowArgs& a, const RowView& v, int32_t begin, float (&x)[kSubFloats], float* stage,
                         bool& nan) {
  if (v.first_bias < v.end_bias) add_biases(a, v, begin, x, stage);
  if (v.mask) {
#pragma unroll
    for (int c = 0; c < kSubFloats; c += kVector) {
      const int32_t at = begin + place_of(c);
      const uint32_t bits = at < v.vocab ? v.mask[at >> 5] >> (at & 31) : 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) x[c + e] = bits >> e & 1 ? x[c + e] : -kInf32;
    }
  }
  float top = x[0];
#pragma unroll
  for (int j = 1; j < kSubFloats; ++j) top = max_or_nan(top, x[j]);
  if (__ballot_sync(kAll, top != top) == 0) return top;
  nan = true, top = -kInf32;
#pragma unroll
  for (int j = 0; j < kSubFloats; ++j) {
    x[j] = x[j] == x[j] ? x[j] : -kInf32;
    top = fmaxf(top, x[j]);
  }
  return top;
}

template <typename T>
N3_DEVICE float load_sub(const RowArgs& a, const RowView& v, int32_t sub, float (&x)[kSubFloats], float* stage) {
  bool nan = false;
  read_sub<T>(v, sub * int32_t(kSub), x);
  return edit_sub(a, v, sub * int32_t(kSub), x, stage, nan);
}

// One logit, edited, by a whole warp.
template <typename T>
N3_DEVICE float load_token(const RowArgs& a, const RowView& v, int32_t token) {
  float x = device::widen(reinterpret_cast<const T*>(v.data)[token]);
#pragma unroll 1
  for (int32_t start = v.first_bias; start < v.end_bias; start += 32) {
    const int32_t at = start + lane_id();
    const float bias = at < v.end_bias ? a.bias_val[at] : 0.f;
    uint32_t hits = __ballot_sync(kAll, at < v.end_bias && a.bias_ids[at] == token);
    for (; hits; hits &= hits - 1) x += __shfl_sync(kAll, bias, __ffs(hits) - 1);
  }
  if (v.mask && !(v.mask[token >> 5] >> (token & 31) & 1)) return -kInf32;
  return x == x ? x : -kInf32;
}

// ---- records

// The largest logit of a tile.
N3_DEVICE float tile_top(const RowArgs& a, int32_t unit, int32_t tile) {
  const float* maxima = a.maxima + int64_t(unit) * a.subs;
  float top = -kInf32;
#pragma unroll
  for (int s = 0; s < kTileSubs; ++s) {
    const int32_t sub = tile * kTileSubs + s;
    if (sub < a.subs) top = fmaxf(top, maxima[sub]);
  }
  return top;
}

// The largest logit of a row, by a whole warp.
N3_DEVICE float row_top(const RowArgs& a, int32_t unit) {
  const float* maxima = a.maxima + int64_t(unit) * a.subs;
  float top = -kInf32;
  for (int32_t s = lane_id(); s < a.subs; s += 32) top = fmaxf(top, maxima[s]);
  return max_of_warp(top);
}

// e^((top of a tile - top of the row) / temperature)
N3_DEVICE double relative(float tile_top, float top, double inverse) {
  return tile_top == top ? 1. : exp((double(tile_top) - double(top)) * inverse);
}

}  // namespace n3::mtp
