// Rows of logits by vectors of N3_LANES; see lanes.h. Whatever is summed is summed in an order of its own, kBlock sums
// side by side, so that the vectors' length does not show.
#pragma once
#include "../common/lanes64.h"
#include "../common/philox.h"
#include "row_kernels.h"

namespace n3::mtp {
namespace {


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

N3_LANE_FN float lane_max(F32 v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// The largest of n logits, n a multiple of kBlock and of 4 kLanes or small.
template <typename T>
N3_LANE_FN float largest_of(const T* x, int64_t n, I32& nan) {
  F32 top[4];
  for (F32& t : top) t = splat(-kInfinity);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const F32 v = load(x + i + j * kLanes);
      nan |= v != v;
      top[j] = max(v, top[j]);
    }
  }
  for (; i < n; i += kLanes) {
    const F32 v = load(x + i);
    nan |= v != v;
    top[0] = max(v, top[0]);
  }
  return lane_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

template <typename T>
bool maxima(const void* row, int64_t subs, float* most) {
  const T* x = static_cast<const T*>(row);
  I32 nan{};
  for (int64_t s = 0; s < subs; ++s, x += kSub) most[s] = largest_of(x, kSub, nan);
  return lane_bits(nan) != 0;
}

float largest(const float* x, int64_t n, bool& nan) {
  I32 seen{};
  const float most = largest_of(x, n, seen);
  nan |= lane_bits(seen) != 0;
  return most;
}

template <typename T>
void widen(const void* row, int64_t n, float* x) {
  const T* logits = static_cast<const T*>(row);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(logits + i));
  for (; i < n; ++i) x[i] = to_float(logits[i]);
  for (; i % kBlock; ++i) x[i] = -kInfinity;
}

int64_t find(const float* x, int64_t n, float value) {
  const F32 wanted = splat(value);
  for (int64_t i = 0; i < n; i += kLanes) {
    if (const uint32_t bits = lane_bits((I32)(load(x + i) == wanted))) return i + __builtin_ctz(bits);
  }
  return n;
}

void mask(float* x, const int32_t* words, int64_t count) {
  U32 bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1u << i;
  const F32 nothing = splat(-kInfinity);
  for (int64_t w = 0; w < count; ++w, x += 32) {
    const uint32_t word = uint32_t(words[w]);
    if (word == 0xffffffff) continue;
    for (int i = 0; i < 32; i += kLanes) {
      const U32 allowed = (U32{} + (word >> i)) & bit;
      store(x + i, allowed != 0 ? load(x + i) : nothing);
    }
  }
}

int64_t collect(const float* x, int64_t n, int32_t base, float bound, float* values, int32_t* ids) {
  const F32 least = splat(bound);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 v = load(x + i);
    uint32_t bits = lane_bits((I32)(v >= least));
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
      if (bits == 0) continue;
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      _mm512_mask_compressstoreu_ps(values + count, bits, (__m512)v);
      _mm512_mask_compressstoreu_epi32(ids + count, bits, _mm512_add_epi32(lane, _mm512_set1_epi32(int(base + i))));
      count += __builtin_popcount(bits);
      continue;
    }
#endif
    if (bits == (1u << kLanes) - 1) {
      store(values + count, v);
      for (int j = 0; j < kLanes; ++j) ids[count + j] = int32_t(base + i + j);
      count += kLanes;
      continue;
    }
    for (; bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      values[count] = x[at], ids[count++] = int32_t(base + at);
    }
  }
  return count;
}

// ---- weights

struct Scales {
  F32 best, high, low, cut;
  N3_LANE_FN explicit Scales(const Scale& s)
      : best(splat(s.best)), high(splat(s.high)), low(splat(s.low)), cut(splat(s.cut)) {}
};

// Within 2 ulp of the formula, but for the rounding of x - best, which logits of 16 bits seldom meet. As exp of
// lanes.h, with what the product with 1 / temperature lost added to the remainder.
N3_LANE_FN F32 weight(const Scales& s, F32 x) {
  const F32 d = min(x - s.best, F32{});
  const F32 h = d * s.high;
  const F32 lost = fma(d, s.low, fma(d, s.high, -h));
  const F32 inside = max(h, splat(-87.f));
  const F32 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 shifted = fma(inside, splat(1.44269504f), magic);
  const F32 n = shifted - magic;
  F32 r = fma(n, splat(-0.693145752f), inside);  // ln 2 in two parts; n times the first is exact
  r = fma(n, splat(-1.42860677e-6f), r) + lost;
  F32 p = splat(1.f / 5040.f);
  p = fma(p, r, splat(1.f / 720.f));
  p = fma(p, r, splat(1.f / 120.f));
  p = fma(p, r, splat(1.f / 24.f));
  p = fma(p, r, splat(1.f / 6.f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  const F32 power = (F32)(((U32)shifted << 23) + (127u << 23));  // 2^n: the bits above n in magic are shifted out
  return (x >= s.cut) & (h >= -87.f) ? p * power : F32{};
}

double mass(const Scale& scale, const float* x, int64_t n) {
  constexpr int kVectors = kBlock / kLanes64;
  const Scales s(scale);
  F64 sums[kVectors] = {};
  for (int64_t i = 0; i < n; i += kBlock) {
    for (int v = 0; v < kBlock / kLanes; ++v) {
      const F32 w = weight(s, load(x + i + v * kLanes));
      HalfF32 half[2];
      std::memcpy(half, &w, sizeof w);
      sums[2 * v] += __builtin_convertvector(half[0], F64);
      sums[2 * v + 1] += __builtin_convertvector(half[1], F64);
    }
  }
  double sum = 0;
  for (int i = 0; i < kBlock; ++i) sum += sums[i / kLanes64][i % kLanes64];
  return sum;
}

void weights(const Scale& scale, const float* x, int64_t n, float* w) {
  const Scales s(scale);
  for (int64_t i = 0; i < n; i += kLanes) store(w + i, weight(s, load(x + i)));
}

// ---- noise

int64_t rivals(const Noise& noise, int64_t first_token, const float* w, int64_t n, float limit, int32_t* found) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 4) {
    const Philox4 words = philox4x32(uint64_t(noise.seed), uint64_t(noise.pos),
                                     uint32_t(kTarget) << 28 | uint32_t((first_token + i) >> 2));
    for (int j = 0; j < 4; ++j) {
      const float rest = float(~words.word[j]) * 0x1p-32f;
      if (w[i + j] > 0 && w[i + j] * limit >= rest) found[count++] = int32_t(i + j);
    }
  }
  return count;
}

// Indexed by Element.
constexpr Kernels kKernels = {
    {maxima<float>, maxima<Half>, maxima<BFloat16>},
    {widen<float>, widen<Half>, widen<BFloat16>},
    largest, find, mask, collect, mass, weights, rivals,
};

}  // namespace
}  // namespace n3::mtp
