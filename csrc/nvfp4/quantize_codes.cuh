// The arithmetic of e2m1 codes and e4m3 scales on a GPU, each operation beside what it replaces on the host. Where
// fmaf() stands a fused multiply-add is meant: the library is compiled without others, and with true divisions.
#pragma once
#include "../common/device.cuh"

namespace n3::nvfp4_quantize {

constexpr uint32_t kInfinity = 0x7f800000;

// ---- e2m1

// Of a = min(|v|, 6): t = a + (2^22 + 3) p with p = 2^max(exponent of a, 0). The last place of t is p / 2, the distance
// of e2m1's values there, so t is rounded as a is to be, to even codes on ties. The 3 p are 6 places, even too: with
// them (t + (t >> 22)) & 7, as integers, is the code.
struct Nearest {
  float t, power;
};
constexpr float kPlaces = 4194304.f + 3.f;

N3_DEVICE Nearest nearest(float v) {
  const float a = fminf(fabsf(v), 6.f);
  const float power = fmaxf(bits_float(float_bits(a) & kInfinity), 1.f);
  return {fmaf(power, kPlaces, a), power};
}

// The bits of a where the mask has ones, else of b. A compiler that knows bits of b makes two instructions of it.
N3_DEVICE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t word;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(word) : "r"(a), "r"(b), "r"(mask));
  return word;
#else
  return (a & mask) | (b & ~mask);
#endif
}

N3_DEVICE uint32_t nearest_code(float v) {
  const uint32_t t = float_bits(nearest(v).t);
  return select_bits(7, t + (t >> 22), float_bits(v) >> 28);
}

// The magnitude of that code: exact.
N3_DEVICE float nearest_value(float v) {
  const Nearest n = nearest(v);
  return fmaf(n.power, -kPlaces, n.t);
}

// Eight codes. NaN does not come here: factors are finite, and a block with a NaN keeps none of its codes.
N3_DEVICE uint32_t nearest_codes(const float* v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
  uint32_t word;  // ties to even, saturates, keeps the sign of a zero: the same as below
  asm("{\n.reg .b8 b0, b1, b2, b3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\ncvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\ncvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
      "mov.b32 %0, {b0, b1, b2, b3};\n}"
      : "=r"(word)
      : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
  return word;
#else
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) word = word * 16 + nearest_code(v[i]);
  return word;
#endif
}

N3_DEVICE uint32_t ceil_to_uint(float v) {
#if defined(__CUDACC__)
  return __float2uint_ru(v);
#else
  return uint32_t(ceilf(v));
#endif
}

// The code below, or the one above where word * 2^-32 < (a - lower) / (upper - lower). Both sides are multiplied by
// 2^32, the right one exactly, and rounded up, which the left one, a whole number, does not notice.
N3_DEVICE uint32_t stochastic_code(float v, uint32_t word) {
  const float a = fminf(fabsf(v), 6.f);
  const uint32_t b = float_bits(a);
  const uint32_t exponent = max(b >> 23, 127u);
  const uint32_t below = a >= 1.f ? (b >> 22) - 252 : uint32_t(a >= 0.5f);
  const float lower = a >= 1.f ? bits_float(b & 0xffc00000) : (a >= 0.5f ? 0.5f : 0.f);
  const float per_width = bits_float((287 - exponent) << 23);  // 2^32 / (upper - lower), the latter 2^(e - 1)
  const uint32_t code = below + (word < ceil_to_uint((a - lower) * per_width));
  return code | (float_bits(v) >> 28 & 8);
}

// ---- e4m3, as e4m3_from_float and e4m3_to_float of numerics.h, but for a NaN, which no scale is

N3_DEVICE uint8_t scale_byte(float v) {
#if defined(__CUDACC__)
  uint16_t both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(0.f), "f"(v));
  return uint8_t(both);
#else
  return e4m3_from_float(v);
#endif
}

N3_DEVICE float scale_value(uint8_t byte) {
#if defined(__CUDACC__)
  uint32_t both;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(uint16_t(byte)));
  return device::widen(device::F16{uint16_t(both)});
#else
  return e4m3_to_float(byte);
#endif
}

// ---- division

// t / 1536 to nearest even, by a corrected product. Fast: in float32, where t / 3 is never half way between two floats;
// t is 0 or between 2^-101 and 2^112, so that nothing over- or underflows. Else in float64, in which a quotient half
// way between two subnormal floats comes out exactly.
template <bool kFast>
N3_HD float over_1536(float t) {
  if constexpr (kFast) {
    constexpr float kInverse = 1.f / 1536.f;
    const float quotient = t * kInverse;
    return fmaf(fmaf(-quotient, 1536.f, t), kInverse, quotient);
  } else {
    constexpr double kInverse = 1. / 1536.;
    const double quotient = double(t) * kInverse;
    const double corrected = fma(fma(-quotient, 1536., double(t)), kInverse, quotient);
    return (float_bits(t) & 0x7fffffff) == kInfinity ? t : float(corrected);
  }
}
N3_HD bool fast_over_1536(float amax) { return fabsf(amax) > 8.0779357e-28f && fabsf(amax) < 1.2676506e30f; }

}  // namespace n3::nvfp4_quantize
