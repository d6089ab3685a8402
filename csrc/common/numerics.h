// e2m1, e4m3, half and bfloat16 bits, and the 128x4 scale layout: host and device, no torch. Tests run every function
// here over all its codes through the _host module; the kernels compile the same functions or are compared with them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define N3_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: a copy compiled in an AVX-512 file must never be the one the linker keeps for everybody.
#define N3_HD __attribute__((always_inline)) inline
#else
#define N3_HD inline
#endif

namespace n3 {

N3_HD uint32_t float_bits(float v) {
  uint32_t b;
  memcpy(&b, &v, sizeof b);
  return b;
}

N3_HD float bits_float(uint32_t b) {
  float v;
  memcpy(&v, &b, sizeof v);
  return v;
}

// ---- e2m1: codes 0..7 are 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign

// To nearest even, saturating at 6; -0 keeps its sign. NaN is the caller's to exclude.
N3_HD uint8_t e2m1_from_float(float v) {
  const uint32_t sign = float_bits(v) >> 28 & 8;
  const float a = fminf(fabsf(v), 6.f);
  const uint32_t b = float_bits(a);
  const uint32_t big = ((b + 0x1fffff + (b >> 22 & 1)) >> 22) - 252;  // a >= 1: keep 1 mantissa bit, rebias
  const uint32_t small = float_bits(a + 4194304.f) & 15;              // below: 2^22 has an ulp of 0.5
  return uint8_t(sign | (a >= 1.f ? big : small));
}

N3_HD float e2m1_to_float(uint8_t code) {
  const uint32_t m = code & 7;
  const uint32_t mag = m < 2 ? m * 0x3f000000u : (m + 252) << 22;
  return bits_float(mag | uint32_t(code & 8) << 28);
}

// ---- e4m3fn: bias 7, largest value 448, NaN is 0x7f and 0xff, no infinity

// To nearest even, saturating at 448, infinity included.
N3_HD uint8_t e4m3_from_float(float v) {
  const uint32_t bits = float_bits(v);
  const uint32_t sign = bits >> 24 & 0x80;
  if ((bits & 0x7fffffff) > 0x7f800000) return uint8_t(sign | 0x7f);
  const float a = fminf(fabsf(v), 448.f);
  const uint32_t b = float_bits(a);
  const uint32_t normal = ((b + 0x7ffff + (b >> 20 & 1)) >> 20) - 960;  // keep 3 mantissa bits, rebias by 120
  const uint32_t subnormal = float_bits(a + 16384.f) & 15;              // 2^14 has an ulp of 2^-9
  return uint8_t(sign | (a >= 0.015625f ? normal : subnormal));
}

N3_HD float e4m3_to_float(uint8_t code) {
  const uint32_t m = code & 0x7f, sign = uint32_t(code & 0x80) << 24;
  if (m == 0x7f) return bits_float(sign | 0x7fc00000);
  const float mag = m < 8 ? float(m) * 0.001953125f : bits_float((m << 20) + (120u << 23));
  return bits_float(float_bits(mag) | sign);
}

// ---- 16-bit floats, as raw bits

N3_HD float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

// To nearest even.
N3_HD uint16_t bf16_from_float(float v) {
  const uint32_t b = float_bits(v);
  const uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return uint16_t((b & 0x7fffffff) > 0x7f800000 ? (b >> 16 | 0x40) : rounded);
}

// Written with selects, so that loops over it vectorise; no float subnormals arise on the way.
N3_HD float half_to_float(uint16_t h) {
  const uint32_t m = h & 0x7fff, sign = uint32_t(h & 0x8000) << 16;
  const uint32_t normal = (m << 13) + (m < 0x7c00 ? 112u << 23 : 224u << 23);
  const uint32_t subnormal = float_bits(float(int32_t(m)) * 5.9604644775390625e-8f);  // 2^-24
  return bits_float((m < 0x400 ? subnormal : normal) | sign);
}

// To nearest even.
N3_HD uint16_t half_from_float(float v) {
  const uint32_t bits = float_bits(v), b = bits & 0x7fffffff;
  const uint32_t normal = (b + 0xfff + (b >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(b) + 0.5f) & 0x7ff;  // 0.5 has an ulp of 2^-24
  uint32_t m = b < 0x38800000 ? subnormal : normal;
  m = b >= 0x477ff000 ? 0x7c00 : m;  // from 65520 up: infinity
  m = b > 0x7f800000 ? 0x7e00 : m;
  return uint16_t(m | (bits >> 16 & 0x8000));
}

// ---- scale layout of the block-scaled tensor core instructions (cuBLASLt VEC16_UE4M3, PTX scale_vec::4X)

// Byte of scale (r, ks) in a matrix with ks_total scales per row: tiles of 128 x 4, 512 bytes each, row-major.
N3_HD int64_t scale_128x4(int64_t r, int64_t ks, int64_t ks_total) {
  const uint64_t row = uint64_t(r), col = uint64_t(ks);  // unsigned: a quotient is then a shift alone
  const uint64_t tile = row / 128 * ((uint64_t(ks_total) + 3) / 4) + col / 4;
  return int64_t(tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + col % 4);
}

}  // namespace n3
