// The arithmetic of the quantiser, compiled once per instruction set by a file that defines N3_LANES: each vector lane
// is one block of 16, x[k] lane b is element k of block b, so maxima, sums over a block, rotations and the packing of
// codes need no horizontal step, and a transposed x, whose neighbours in memory are in one column, no transposition.
#pragma once
#include <cfloat>
#include <utility>

#include "../common/philox_lanes.h"
#include "quantize_kernels.h"

namespace n3::nvfp4_quantize {
namespace {

constexpr int L = kLanes;
using U8 = uint8_t __attribute__((vector_size(L)));
using Blocks = F32[16];

// ---- reading

// Swaps bit S of row and lane numbers between rows a and b = a + S.
template <int S, size_t... I>
N3_LANE_FN void exchange(U32& a, U32& b, std::index_sequence<I...>) {
  const U32 low = __builtin_shufflevector(a, b, (I & S ? L + (I ^ S) : I)...);
  b = __builtin_shufflevector(a, b, (I & S ? L + I : I ^ S)...);
  a = low;
}

// rows[i] lane j = rows[j] lane i, in every kRows lanes.
template <int kRows, int S = 1>
N3_LANE_FN void transpose(U32* rows) {
  if constexpr (S < kRows) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (!(r & S)) exchange<S>(rows[r], rows[r + S], std::make_index_sequence<L>());
    }
    transpose<kRows, 2 * S>(rows);
  }
}

template <size_t... I>
N3_LANE_FN U32 join(U32 low, U32 high, std::index_sequence<I...>) {
  return __builtin_shufflevector(low, high, (int(I) < L / 2 ? I : I + L / 2)...);
}

N3_LANE_FN U32 load_dwords(const void* p) {
  U32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The blocks at(0) .. at(L - 1). Blocks of 16-bit elements are transposed as pairs and then taken apart.
template <typename T, typename At>
N3_LANE_FN void load_blocks(const At& at, Blocks& x) {
  if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 4
    for (int part = 0; part < 16; part += L) {
      U32 rows[L];
#pragma GCC unroll 16
      for (int b = 0; b < L; ++b) rows[b] = load_dwords(at(b) + part);
      transpose<L>(rows);
#pragma GCC unroll 16
      for (int b = 0; b < L; ++b) x[part + b] = (F32)rows[b];
    }
  } else {
    constexpr int kPairs = L < 8 ? L : 8;  // of a block in one vector; 16 lanes hold a block in each half
#pragma GCC unroll 2
    for (int part = 0; part < 8; part += kPairs) {
      U32 rows[kPairs];
#pragma GCC unroll 8
      for (int b = 0; b < kPairs; ++b) {
        if constexpr (L == 16) {
          U32 halves;
          std::memcpy(&halves, at(b), 32);
          std::memcpy(reinterpret_cast<char*>(&halves) + 32, at(b + 8), 32);
          rows[b] = halves;
        } else {
          rows[b] = load_dwords(at(b) + 2 * part);
        }
      }
      transpose<kPairs>(rows);
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) {
        const int k = 2 * (part + i);
        if constexpr (std::is_same_v<T, BFloat16>) {
          x[k] = (F32)(rows[i] << 16), x[k + 1] = (F32)(rows[i] & 0xffff0000);
        } else {
          x[k] = from_words(T{}, rows[i] & 0xffff), x[k + 1] = from_words(T{}, rows[i] >> 16);
        }
      }
    }
  }
}

// Rows of one block, side by side in memory: the first `rows` lanes, the others 0.
template <typename T>
N3_LANE_FN void load_columns(const T* p, int64_t k_stride, int64_t rows, Blocks& x) {
  if (rows >= L) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) x[k] = load(p + k * k_stride);
  } else {
    for (int k = 0; k < 16; ++k) x[k] = load_part(p + k * k_stride, rows);
  }
}

// (x * signs) @ H16 / 4.
template <typename T>
N3_LANE_FN void rotate(Blocks& x, const float* signs) {
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) x[k] *= signs[k];
#pragma GCC unroll 4
  for (int stride = 1; stride < 16; stride *= 2) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      if (k & stride) continue;
      const F32 a = x[k], b = x[k + stride];
      x[k] = a + b, x[k + stride] = a - b;
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) x[k] = rounded<T>(x[k] * 0.25f);
}

// ---- scales

constexpr int32_t kInfinity = 0x7f800000;

N3_LANE_FN I32 magnitude(F32 v) { return (I32)v & 0x7fffffff; }  // ordered like the floats; infinity and NaN above all

N3_LANE_FN I32 larger(I32 a, I32 b) { return a > b ? a : b; }

N3_LANE_FN I32 block_amax(const Blocks& x) {
  I32 top[2] = {magnitude(x[0]), magnitude(x[1])};
#pragma GCC unroll 16
  for (int k = 2; k < 16; ++k) top[k % 2] = larger(magnitude(x[k]), top[k % 2]);
  return larger(top[0], top[1]);
}

// Global of the row of each block.
struct Globals {
  F32 s_enc, inv, amax;
  bool normal;  // all that is decoded under amax, which is 2^-21 to 2^12 times as large, is a normal number or 0

  N3_LANE_FN explicit Globals(const Global& g)
      : s_enc(splat(g.s_enc)), inv(splat(g.inv)), amax(splat(g.amax)), normal(is_normal(g.amax)) {}

  N3_LANE_FN explicit Globals(const Global* const (&of)[L]) : normal(true) {
    for (int i = 0; i < L; ++i) {
      s_enc[i] = of[i]->s_enc, inv[i] = of[i]->inv, amax[i] = of[i]->amax;
      normal = normal && is_normal(of[i]->amax);
    }
  }

 private:
  static bool is_normal(float amax) { return amax >= 0x1p-100f && amax <= 0x1p115f; }
};

// e4m3 bits and the value they stand for.
struct Scale {
  U32 byte;
  F32 value;
};

// To nearest even, saturating at 448.
N3_LANE_FN Scale round_scale(F32 p) {
  const U32 sign = (U32)p & 0x80000000;
  const F32 a = min((F32)magnitude(p), splat(448.f));
  const U32 b = (U32)a;
  const U32 normal = ((b + 0x7ffff + (b >> 20 & 1)) >> 20) - 960;
  const U32 subnormal = (U32)(a + 16384.f) & 15;
  const U32 byte = a >= 0.015625f ? normal : subnormal;
  const U32 value = byte < 8 ? (U32)(__builtin_convertvector((I32)byte, F32) * 0x1p-9f) : (byte << 20) + (120u << 23);
  return {byte | sign >> 24, (F32)(value | sign)};
}

N3_LANE_FN F32 encode_factor(const Scale& scale, const Globals& g) {
  return min(1.f / (scale.value * g.inv), splat(FLT_MAX));
}

// ---- codes

// A magnitude of at most 6 added to `magic`, whose last bit is worth the distance of two codes there, is rounded to a
// code's value, ties to even. The last three bits of the sum are the code: those of magic count the codes skipped.
struct Grid {
  F32 magic;

  N3_LANE_FN explicit Grid(F32 a) {
    const U32 exponent = (U32)max(a, splat(1.f)) & 0x7f800000;
    magic = (F32)(exponent + (exponent >> 22) + ((22u << 23) - 254));
  }
};

N3_LANE_FN F32 at_most_six(F32 a) { return min(a, splat(6.f)); }

// e2m1_from_float of v.
N3_LANE_FN U32 nearest(F32 v) {
  const F32 a = at_most_six((F32)magnitude(v));
  return ((U32)(a + Grid(a).magic) & 7) | ((U32)v >> 28 & 8);
}

// The lower neighbour if word * 2^-32 >= fraction, else the upper.
N3_LANE_FN U32 stochastic(F32 v, U32 word) {
  const F32 a = at_most_six((F32)magnitude(v));
  const U32 above = ((U32)max(a, splat(1.f)) >> 23) - 127;           // 0, 1, 2: exponent of the codes' distance + 1
  const F32 steps = a * (F32)((128u - above) << 23);                     // exact
  const I32 whole = __builtin_convertvector(steps, I32);
  const F32 wanted = (steps - __builtin_convertvector(whole, F32)) * 0x1p32f;
  // word < wanted, exactly: as integers, wanted rounded up; it has digits behind the point below 2^24 only.
  const I32 signed_part = __builtin_convertvector(wanted >= 0x1p31f ? wanted - 0x1p32f : wanted, I32);
  const I32 more = (wanted < 0x1p24f) & (wanted > __builtin_convertvector(signed_part, F32));
  const U32 limit = (U32)(signed_part - more);  // rounded up
  const U32 up = (U32)(word < limit) & 1;
  return ((U32)whole + 2 * above + up) | ((U32)v >> 28 & 8);
}

// The words of stochastic rounding.
class Random {
 public:
  explicit Random(const int64_t* seed) : offset_(seed ? seed[1] : 0), philox_(seed ? seed[0] : 0) {}

  // The lanes are blocks number block, block + stride, ...
  N3_LANE_FN void set(uint64_t block, uint64_t stride) {
    for (int i = 0; i < kLanes64; ++i) {
      first_[0][i] = (block + 2 * i * stride) * 4, first_[1][i] = (block + (2 * i + 1) * stride) * 4;
    }
  }

  // Of elements 4 * quad .. 4 * quad + 3.
  N3_LANE_FN void words(int quad, U32 (&out)[4]) const {
    U64 c[4][2];
    for (int odd = 0; odd < 2; ++odd) {
      c[0][odd] = first_[odd] + uint64_t(quad), c[1][odd] = c[0][odd] >> 32;
      c[2][odd] = U64{} + offset_, c[3][odd] = c[2][odd] >> 32;
    }
    philox_(c[0], c[1], c[2], c[3]);
    for (int i = 0; i < 4; ++i) out[i] = (U32)((c[i][0] & 0xffffffff) | c[i][1] << 32);
  }

 private:
  uint64_t offset_;
  PhiloxLanes philox_;
  U64 first_[2];  // counters of even and odd lanes
};

struct Codes {
  U32 word[2] = {};  // codes 0..7 and 8..15, the low nibble first
};

N3_LANE_FN Codes encode_nearest(const Blocks& x, F32 factor) {
  Codes codes;
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) codes.word[k / 8] |= nearest(x[k] * factor) << (4 * (k % 8));
  return codes;
}

N3_LANE_FN Codes encode_stochastic(const Blocks& x, F32 factor, const Random& random) {
  Codes codes;
#pragma GCC unroll 1
  for (int quad = 0; quad < 4; ++quad) {
    U32 word[4], nibbles{};
    random.words(quad, word);
    for (int i = 0; i < 4; ++i) nibbles |= stochastic(x[4 * quad + i] * factor, word[i]) << (4 * i);
    codes.word[quad / 2] |= nibbles << (16 * (quad % 2));
  }
  return codes;
}

// ---- four over six

// What a magnitude that was rounded to a code decodes to, ((code * scale) * amax) / 1536. Codes are 2^n and 1.5 * 2^n,
// and a power of two commutes with rounding while all are normal numbers: two quotients serve a block.
class Decoded {
 public:
  N3_LANE_FN Decoded(F32 scale, F32 amax) : one_(quotient(scale, amax)), three_(quotient(scale * 1.5f, amax)) {}

  N3_LANE_FN F32 operator()(F32 code) const {
    const F32 power = (F32)((U32)code & 0x7f800000);
    return power * (((U32)code & 0x00400000) != 0 ? three_ : one_);
  }

  N3_LANE_FN static F32 quotient(F32 value, F32 amax) { return value * amax / 1536.f; }

 private:
  F32 one_, three_;
};

// Sum over a block, k in order, of the differences between x and what it decodes to under `scale`.
template <bool kMse, bool kNormal>
F32 error_under(const Blocks& x, const Scale& scale, const Globals& g) {
  const F32 factor = encode_factor(scale, g);
  const Decoded decoded(scale.value, g.amax);
  F32 sum{};
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const F32 wide = (F32)magnitude(x[k]), a = at_most_six(wide * factor);
    const F32 magic = Grid(a).magic, code = a + magic - magic;
    const F32 d = (kNormal ? decoded(code) : Decoded::quotient(code * scale.value, g.amax)) - wide;
    sum += kMse ? d * d : (F32)magnitude(d);
  }
  return sum;
}

N3_LANE_FN F32 error_of(const Blocks& x, const Scale& scale, const Globals& g, bool mse) {
  if (g.normal) return mse ? error_under<true, true>(x, scale, g) : error_under<false, true>(x, scale, g);
  return mse ? error_under<true, false>(x, scale, g) : error_under<false, false>(x, scale, g);
}

struct Candidates {
  Scale six, four;
};

N3_LANE_FN Candidates candidates(I32 amax, const Globals& g) {
  const F32 base = (F32)amax / 6.f * g.s_enc;
  return {round_scale(base), round_scale(base * 1.5f)};
}

N3_LANE_FN Scale better(const Candidates& c, F32 six_error, F32 four_error) {
  const I32 four = four_error < six_error;
  return {four ? c.four.byte : c.six.byte, four ? c.four.value : c.six.value};
}

N3_LANE_FN Scale plain_scale(I32 amax, const Globals& g) {
  return round_scale((F32)amax * (g.s_enc * (1.f / 6.f)));
}

// ---- writing

struct Quantized {
  Codes codes;
  U32 byte;
};

// Nothing survives a scale of 0, nor one that is NaN because of what is in the block.
N3_LANE_FN Quantized finish(Codes codes, const Scale& scale, I32 amax) {
  const U32 finite = (U32)(amax < kInfinity), keep = finite & (U32)((scale.byte & 0x7f) != 0);
  codes.word[0] &= keep, codes.word[1] &= keep;
  return {codes, finite ? scale.byte : U32{} + 0x7f};
}

template <int kHalf, size_t... I>
N3_LANE_FN U32 interleave(U32 a, U32 b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (kHalf * L / 2 + I / 2 + I % 2 * L)...);
}

N3_LANE_FN void store(const Quantized& v, uint8_t* q, uint8_t* scale) {
  const auto lanes = std::make_index_sequence<L>();
  const U32 words[2] = {interleave<0>(v.codes.word[0], v.codes.word[1], lanes),
                        interleave<1>(v.codes.word[0], v.codes.word[1], lanes)};
  const U8 bytes = __builtin_convertvector(v.byte, U8);
  std::memcpy(q, words, sizeof words);
  std::memcpy(scale, &bytes, sizeof bytes);
}

}  // namespace
}  // namespace n3::nvfp4_quantize
