// Vectors of N3_LANES floats, for kernels that are compiled once per instruction set: a file defines N3_LANES (4 with
// the vectors every CPU has, 8 in *_avx2.cpp, 16 in *_avx512.cpp) and includes this. Compiler vectors, so that + - * /,
// comparisons and ?: work lane by lane; each function does the same operations in the same order for every N3_LANES, so
// a kernel whose sums do not depend on it gives the same bits everywhere. All is in an anonymous namespace: no copy
// made for one instruction set can be linked into another's code.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace n3 {
namespace {

constexpr int kLanes = N3_LANES;
using F32 = float __attribute__((vector_size(4 * kLanes)));
using I32 = int32_t __attribute__((vector_size(4 * kLanes)));
using U32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));

#define N3_LANE_FN __attribute__((always_inline)) inline

N3_LANE_FN F32 splat(float v) { return v - F32{}; }  // minus zero is no operation: a plain broadcast

// ---- memory; no alignment is asked

N3_LANE_FN F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// kLanes 16-bit words as integers and back, in one and two instructions where GCC 12 makes four.
N3_LANE_FN U32 load_words(const void* p) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes == 8) return (U32)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#endif
  U16 h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, U32);
}

N3_LANE_FN void store_words(void* p, U32 v) {  // v < 2^16
#if !defined(__AVX512F__) && defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes == 8) {
    const __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
    return _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
#endif
  const U16 h = __builtin_convertvector(v, U16);
  std::memcpy(p, &h, sizeof h);
}

// 16-bit elements, in the low halves of words, as floats and back, to nearest even: bf16_to_float, half_to_float,
// bf16_from_float and half_from_float in lanes. No subnormal floats arise on the way.
N3_LANE_FN F32 from_words(BFloat16, U32 h) { return (F32)(h << 16); }

N3_LANE_FN F32 from_words(Half, U32 h) {
  const U32 m = h & 0x7fff;
  const U32 normal = (m << 13) + (m < 0x7c00 ? U32{} + (112u << 23) : U32{} + (224u << 23));
  const U32 subnormal = (U32)(__builtin_convertvector((I32)m, F32) * 0x1p-24f);
  return (F32)((m < 0x400 ? subnormal : normal) | (h & 0x8000) << 16);
}

N3_LANE_FN U32 to_words(BFloat16, F32 v) {
  const U32 b = (U32)v;
  const U32 rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return (b & 0x7fffffff) > 0x7f800000 ? (b >> 16 | 0x40) : rounded;
}

N3_LANE_FN U32 to_words(Half, F32 v) {
  const U32 bits = (U32)v, b = bits & 0x7fffffff;
  const U32 normal = (b + 0xfff + (b >> 13 & 1) - (112u << 23)) >> 13;
  const U32 subnormal = (U32)((F32)b + 0.5f) & 0x7ff;
  U32 m = b < 0x38800000 ? subnormal : normal;
  m = b >= 0x477ff000 ? U32{} + 0x7c00 : m;
  m = b > 0x7f800000 ? U32{} + 0x7e00 : m;
  return m | (bits >> 16 & 0x8000);
}

N3_LANE_FN F32 load(const BFloat16* p) { return from_words(BFloat16{}, load_words(p)); }
N3_LANE_FN F32 load(const Half* p) { return from_words(Half{}, load_words(p)); }

N3_LANE_FN void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }
N3_LANE_FN void store(BFloat16* p, F32 v) { store_words(p, to_words(BFloat16{}, v)); }
N3_LANE_FN void store(Half* p, F32 v) { store_words(p, to_words(Half{}, v)); }

// Rounded to T, to nearest even.
template <typename T>
N3_LANE_FN F32 rounded(F32 v) {
  if constexpr (sizeof(T) == 4) return v;
  else return from_words(T{}, to_words(T{}, v));
}

// The first n < kLanes elements alone are touched; the other lanes are 0.
template <typename T>
N3_LANE_FN F32 load_part(const T* p, int64_t n) {
  T whole[kLanes] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}

template <typename T>
N3_LANE_FN void store_part(T* p, F32 v, int64_t n) {
  T whole[kLanes];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(T));
}

// ---- arithmetic

// a * b + c, rounded once.
N3_LANE_FN F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes == 8) return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}

// The smaller and the larger; b where one of them is NaN.
N3_LANE_FN F32 min(F32 a, F32 b) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return (F32)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes == 8) return (F32)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}

N3_LANE_FN F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return (F32)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes == 8) return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

// e^x within 1 ulp; subnormal results become 0. exp(-inf) = 0, exp(NaN) = NaN.
N3_LANE_FN F32 exp(F32 x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7 (the next term is below 2^-27 e^r).
  const F32 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 inside = x < -87.f ? splat(-87.f) : x > 89.f ? splat(89.f) : x;
  const F32 shifted = fma(inside, splat(1.44269504f), magic);
  const F32 n = shifted - magic;
  F32 r = fma(n, splat(-0.693145752f), inside);  // ln 2 in two parts; n times the first is exact
  r = fma(n, splat(-1.42860677e-6f), r);
  F32 p = splat(1.f / 5040.f);
  p = fma(p, r, splat(1.f / 720.f));
  p = fma(p, r, splat(1.f / 120.f));
  p = fma(p, r, splat(1.f / 24.f));
  p = fma(p, r, splat(1.f / 6.f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  // 2^n in two factors, for n = 128.
  const I32 e = (I32)((U32)shifted - (U32)magic), half = e >> 1;
  const F32 result = p * (F32)((half + 127) << 23) * (F32)((e - half + 127) << 23);
  return x < -87.f ? F32{} : x > 88.7228394f ? splat(__builtin_inff()) : result;
}

// ln(1 + x) for x >= 0, within 2 ulp.
N3_LANE_FN F32 log1p(F32 x) {
  // 1 + x = u + c with u a float and c what its rounding lost; u = 2^e m, sqrt(1/2) <= m < sqrt(2).
  const F32 u = x + 1.f;
  const F32 lost = x > 1.f ? 1.f - (u - x) : x - (u - 1.f);
  const I32 e = (I32)((U32)u - 0x3f3504f3u) >> 23;
  const F32 m = (F32)((U32)u - ((U32)e << 23));
  const F32 f = m - 1.f;
  // ln(1 + f) = 2 atanh(s), s = f / (2 + f): odd series in s, |s| <= 0.1716, the next term is below 2^-30.
  const F32 s = f / (f + 2.f), s2 = s * s;
  F32 p = splat(2.f / 11.f);
  p = fma(p, s2, splat(2.f / 9.f));
  p = fma(p, s2, splat(2.f / 7.f));
  p = fma(p, s2, splat(2.f / 5.f));
  p = fma(p, s2, splat(2.f / 3.f));
  // f - s * (f - s2 * p) keeps the digits of f.
  const F32 ln_m = f - s * (f - s2 * p);
  const F32 n = __builtin_convertvector(e, F32);
  const F32 low = fma(n, splat(-2.12194440e-4f), lost / u);
  const F32 result = fma(n, splat(0.693359375f), ln_m + low);
  return x < __builtin_inff() ? result : x;  // infinity and NaN
}

// 1 / (1 + e^-x) within 3 ulp, and 0 below -87. The exponential is that of exp(), without the cases that cannot occur
// here: below e^-87 it is lost beside 1.
N3_LANE_FN F32 sigmoid(F32 x) {
  const F32 inside = max(splat(-87.f), min(splat(87.f), x));
  const F32 magic = splat(12582912.f);
  const F32 shifted = fma(inside, splat(-1.44269504f), magic);
  const F32 n = shifted - magic;
  F32 r = fma(n, splat(-0.693145752f), -inside);
  r = fma(n, splat(-1.42860677e-6f), r);
  F32 p = splat(1.f / 5040.f);
  p = fma(p, r, splat(1.f / 720.f));
  p = fma(p, r, splat(1.f / 120.f));
  p = fma(p, r, splat(1.f / 24.f));
  p = fma(p, r, splat(1.f / 6.f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  const F32 power = (F32)(((U32)shifted << 23) + (127u << 23));  // 2^n: the bits above n in magic are shifted out
  const F32 result = 1.f / fma(p, power, splat(1.f));
  return x < -87.f ? F32{} : result;
}

N3_LANE_FN F32 silu(F32 x) { return x * sigmoid(x); }

// log1p(e^x), and x itself above 20, as PyTorch's softplus.
N3_LANE_FN F32 softplus(F32 x) {
  return x > 20.f ? x : log1p(exp(x > 20.f ? F32{} : x));
}

}  // namespace
}  // namespace n3
