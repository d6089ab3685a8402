// Vectors of kLanes64 doubles beside the floats of lanes.h, half as many to a vector, under the same rule: the same
// bits for every N3_LANES.
#pragma once
#include "lanes.h"

namespace n3 {
namespace {

constexpr int kLanes64 = kLanes / 2;
using F64 = double __attribute__((vector_size(8 * kLanes64)));
using I64 = int64_t __attribute__((vector_size(8 * kLanes64)));
using U64 = uint64_t __attribute__((vector_size(8 * kLanes64)));
using HalfF32 = float __attribute__((vector_size(4 * kLanes64)));  // as many floats

N3_LANE_FN F64 splat64(double v) { return v - F64{}; }

// Doubles rounded to kLanes64 floats; no alignment is asked.
N3_LANE_FN void store64(float* p, F64 v) {
  const HalfF32 rounded = __builtin_convertvector(v, HalfF32);
  std::memcpy(p, &rounded, sizeof rounded);
}

// a * b + c, rounded once.
N3_LANE_FN F64 fma(F64 a, F64 b, F64 c) {
#if defined(__AVX512F__)
  if constexpr (kLanes64 == 8) return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes64 == 4) return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  for (int i = 0; i < kLanes64; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}

// e^x within 1 ulp, and 0 below e^-708, short of the subnormals. exp(-inf) = 0, exp(NaN) = NaN.
N3_LANE_FN F64 exp(F64 x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 13 (the next term is below 2^-57 e^r).
  const F64 magic = splat64(0x1.8p52);  // adding it rounds to an integer
  const F64 inside = x < -708. ? splat64(-708.) : x > 710. ? splat64(710.) : x;
  const F64 shifted = fma(inside, splat64(0x1.71547652b82fep0), magic);
  const F64 n = shifted - magic;
  F64 r = fma(n, splat64(-0x1.62e42feep-1), inside);  // ln 2 in two parts; n times the first is exact
  r = fma(n, splat64(-0x1.a39ef35793c76p-33), r);
  F64 p = splat64(1. / 6227020800.);
  p = fma(p, r, splat64(1. / 479001600.));
  p = fma(p, r, splat64(1. / 39916800.));
  p = fma(p, r, splat64(1. / 3628800.));
  p = fma(p, r, splat64(1. / 362880.));
  p = fma(p, r, splat64(1. / 40320.));
  p = fma(p, r, splat64(1. / 5040.));
  p = fma(p, r, splat64(1. / 720.));
  p = fma(p, r, splat64(1. / 120.));
  p = fma(p, r, splat64(1. / 24.));
  p = fma(p, r, splat64(1. / 6.));
  p = fma(p, r, splat64(0.5));
  p = fma(p, r, splat64(1.));
  p = fma(p, r, splat64(1.));
  // 2^n in two factors, for n = 1024; 2046 is twice the bias of the exponent.
  const U64 biased = (U64)shifted - (U64)magic + 2046u, half = biased >> 1;
  const F64 result = p * (F64)(half << 52) * (F64)((biased - half) << 52);
  return x < -708. ? F64{} : x > 709.78271289338397 ? splat64(__builtin_inf()) : result;
}

// 1 / (1 + e^-x)
N3_LANE_FN F64 sigmoid(F64 x) { return 1. / (1. + exp(-x)); }

}  // namespace
}  // namespace n3
