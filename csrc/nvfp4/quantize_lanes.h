// The quantiser, compiled once per instruction set by a file that defines N3_LANES: each vector lane is one block of
// 16, so maxima, the sums of four_over_six and the packing of codes need no horizontal step. Blocks are read in groups
// of N3_LANES and transposed in registers. Compiler vectors rather than intrinsics: one text, the same bits everywhere.
#pragma once
#include <cfloat>
#include <cstring>
#include <utility>

#include "quantize_kernels.h"

namespace n3::nvfp4_quantize {
namespace {

constexpr int L = N3_LANES;
using F32 = float __attribute__((vector_size(4 * L)));
using I32 = int32_t __attribute__((vector_size(4 * L)));
using U32 = uint32_t __attribute__((vector_size(4 * L)));
using U16 = uint16_t __attribute__((vector_size(2 * L)));
using U8 = uint8_t __attribute__((vector_size(L)));

template <typename V>
V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// L elements as float. The half conversion is that of half_to_float: no subnormal floats on the way.
template <Source kSource>
F32 load_floats(const void* x, int64_t i) {
  if constexpr (kSource == Source::kFloat) {
    return load<F32>(static_cast<const float*>(x) + i);
  } else {
    const U32 h = __builtin_convertvector(load<U16>(static_cast<const uint16_t*>(x) + i), U32);
    if constexpr (kSource == Source::kBFloat16) return (F32)(h << 16);
    const U32 m = h & 0x7fff;
    const U32 normal = (m << 13) + (m < 0x7c00 ? U32{} + (112u << 23) : U32{} + (224u << 23));
    const U32 subnormal = (U32)(__builtin_convertvector((I32)m, F32) * 0x1p-24f);
    return (F32)((m < 0x400 ? subnormal : normal) | (h & 0x8000) << 16);
  }
}

// Swaps bit S of row and lane numbers between rows a and b = a + S.
template <int S, size_t... I>
void exchange(F32& a, F32& b, std::index_sequence<I...>) {
  const F32 low = __builtin_shufflevector(a, b, (I & S ? L + (I ^ S) : I)...);
  b = __builtin_shufflevector(a, b, (I & S ? L + I : I ^ S)...);
  a = low;
}

template <int S = 1>
void transpose(F32* rows) {
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      if (!(r & S)) exchange<S>(rows[r], rows[r + S], std::make_index_sequence<L>());
    }
    transpose<2 * S>(rows);
  }
}

// x[k] lane b = element k of block b, for the L blocks at x.
template <Source kSource>
void load_group(const void* data, F32 (&x)[16]) {
#pragma GCC unroll 4
  for (int part = 0; part < 16; part += L) {
#pragma GCC unroll 16
    for (int b = 0; b < L; ++b) x[part + b] = load_floats<kSource>(data, b * 16 + part);
    transpose(x + part);
  }
}

U32 max_magnitude(const F32 (&x)[16]) {
  I32 top{};
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const I32 mag = (I32)x[k] & 0x7fffffff;  // ordered like the floats; infinity and NaN above all
    top = mag > top ? mag : top;
  }
  return (U32)top;
}

// e4m3 bits of p and the value they stand for.
struct Scale {
  U32 byte;
  F32 value;
};

Scale round_scale(F32 p) {
  const U32 sign = (U32)p & 0x80000000;
  F32 a = (F32)((U32)p & 0x7fffffff);
  a = a < 448.f ? a : F32{} + 448.f;
  const U32 b = (U32)a;
  const U32 normal = ((b + 0x7ffff + (b >> 20 & 1)) >> 20) - 960;
  const U32 subnormal = (U32)(a + 16384.f) & 15;
  const U32 byte = a >= 0.015625f ? normal : subnormal;
  const U32 value = byte < 8 ? (U32)(__builtin_convertvector((I32)byte, F32) * 0x1p-9f) : (byte << 20) + (120u << 23);
  return {byte | sign >> 24, (F32)(value | sign)};
}

F32 encode_factor(F32 scale, float inv) {
  const F32 e = 1.f / (scale * inv);
  return e < FLT_MAX ? e : F32{} + FLT_MAX;
}

// e2m1_from_float of v = x * enc.
U32 code(F32 v) {
  const U32 bits = (U32)v;
  F32 a = (F32)(bits & 0x7fffffff);
  a = a < 6.f ? a : F32{} + 6.f;
  const U32 b = (U32)a;
  const U32 big = ((b + 0x1fffff + (b >> 22 & 1)) >> 22) - 252;
  const U32 small = (U32)(a + 4194304.f) & 15;
  return (a >= 1.f ? big : small) | (bits >> 28 & 8);
}

F32 code_value(U32 c) {
  const U32 m = c & 7;
  return (F32)((m < 2 ? m * 0x3f000000u : (m + 252) << 22) | (c & 8) << 28);
}

struct Block {
  Scale scale;
  U32 word[2];  // codes 0..7 and 8..15, the low nibble first
};

Block encode_group(const F32 (&x)[16], Scale scale, float inv) {
  const F32 enc = encode_factor(scale.value, inv);
  Block out{scale, {}};
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) out.word[k / 8] |= code(x[k] * enc) << (4 * (k % 8));
  const U32 keep = (U32)((scale.byte & 0x7f) != 0);  // nothing survives a scale of 0
  out.word[0] &= keep;
  out.word[1] &= keep;
  return out;
}

F32 error_of(const F32 (&x)[16], const Block& block, float inv) {
  F32 sum{};
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const F32 decoded = code_value(block.word[k / 8] >> (4 * (k % 8)) & 15) * block.scale.value * inv;
    sum += (F32)((U32)(decoded - x[k]) & 0x7fffffff);
  }
  return sum;
}

template <Source kSource>
void encode_blocks(const void* data, Encoding encoding, uint8_t* q, uint8_t* scale) {
  F32 x[16];
  load_group<kSource>(data, x);
  const U32 top = max_magnitude(x);
  const float inv = 1.f / encoding.s_enc;
  Block block;
  if (encoding.four_over_six) {
    const F32 base = (F32)top / 6.f * encoding.s_enc;
    block = encode_group(x, round_scale(base), inv);
    const Block four = encode_group(x, round_scale(base * 1.5f), inv);
    const U32 better = (U32)(error_of(x, four, inv) < error_of(x, block, inv));
    block.scale.byte = better ? four.scale.byte : block.scale.byte;
    for (int h = 0; h < 2; ++h) block.word[h] = better ? four.word[h] : block.word[h];
  } else {
    block = encode_group(x, round_scale((F32)top * (encoding.s_enc / 6.f)), inv);
  }
  const U32 finite = (U32)(top < 0x7f800000);
  const U8 bytes = __builtin_convertvector(finite ? block.scale.byte : U32{} + 0x7f, U8);
  std::memcpy(scale, &bytes, L);
  uint32_t words[2][L];
  for (int h = 0; h < 2; ++h) {
    const U32 w = block.word[h] & finite;
    std::memcpy(words[h], &w, sizeof w);
  }
  for (int b = 0; b < L; ++b) {
    std::memcpy(q + 8 * b, &words[0][b], 4);
    std::memcpy(q + 8 * b + 4, &words[1][b], 4);
  }
}

template <Source kSource>
void encode_from(const void* x, int64_t blocks, Encoding encoding, uint8_t* q, uint8_t* scale) {
  constexpr int64_t kBlockBytes = 16 * (kSource == Source::kFloat ? 4 : 2);
  const char* in = static_cast<const char*>(x);
  int64_t b = 0;
  for (; b + L <= blocks; b += L) encode_blocks<kSource>(in + b * kBlockBytes, encoding, q + b * 8, scale + b);
  if (b == blocks) return;
  // The last group is padded with zero blocks.
  char rest[L * kBlockBytes] = {};
  uint8_t rest_q[L * 8], rest_scale[L];
  std::memcpy(rest, in + b * kBlockBytes, (blocks - b) * kBlockBytes);
  encode_blocks<kSource>(rest, encoding, rest_q, rest_scale);
  std::memcpy(q + b * 8, rest_q, (blocks - b) * 8);
  std::memcpy(scale + b, rest_scale, blocks - b);
}

void encode(const void* x, Source source, int64_t blocks, Encoding encoding, uint8_t* q, uint8_t* scale) {
  switch (source) {
    case Source::kFloat: return encode_from<Source::kFloat>(x, blocks, encoding, q, scale);
    case Source::kHalf: return encode_from<Source::kHalf>(x, blocks, encoding, q, scale);
    case Source::kBFloat16: return encode_from<Source::kBFloat16>(x, blocks, encoding, q, scale);
  }
}

template <Source kSource>
uint32_t amax_of(const void* x, int64_t blocks) {
  I32 top[4] = {};
  for (int64_t i = 0; i < blocks * 16; i += 16) {
#pragma GCC unroll 4
    for (int part = 0; part < 16; part += L) {
      I32 mag = (I32)load_floats<kSource>(x, i + part) & 0x7fffffff;
      mag = mag < 0x7f800000 ? mag : I32{};
      I32& t = top[part / L];
      t = mag > t ? mag : t;
    }
  }
  int32_t result = 0;
  for (const I32& t : top) {
    for (int lane = 0; lane < L; ++lane) result = t[lane] > result ? t[lane] : result;
  }
  return uint32_t(result);
}

uint32_t amax(const void* x, Source source, int64_t blocks) {
  switch (source) {
    case Source::kFloat: return amax_of<Source::kFloat>(x, blocks);
    case Source::kHalf: return amax_of<Source::kHalf>(x, blocks);
    case Source::kBFloat16: return amax_of<Source::kBFloat16>(x, blocks);
  }
  return 0;
}

}  // namespace
}  // namespace n3::nvfp4_quantize
