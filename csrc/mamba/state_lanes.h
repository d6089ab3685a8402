// Rows of states and operands, for the kernels that are compiled once per instruction set: loads of every storage
// dtype, sums over the state dimension in 16 lanes whatever the vector, and rounding, stochastic too.
#pragma once
#include <type_traits>
#include <utility>

#include "../common/philox_lanes.h"
#include "ssm_update_kernels.h"

namespace n3::ssm_update {
namespace {

constexpr int kParts = kTile / kLanes;  // vectors of a tile
using F4 = float __attribute__((vector_size(16)));
using I8 = int8_t __attribute__((vector_size(kLanes)));
using U8 = uint8_t __attribute__((vector_size(kLanes)));

struct Int8 {
  int8_t bits;
};
struct E4m3 {
  uint8_t bits;
};
template <typename T>
constexpr bool kScaled = std::is_same_v<T, Int8> || std::is_same_v<T, E4m3>;

using n3::load;

// kLanes bytes as integers; GCC would convert them one by one.
template <bool kSigned>
N3_LANE_FN I32 load_bytes(const void* p) {
#if N3_LANES == 16
  __m128i v;
  std::memcpy(&v, p, sizeof v);
  return (I32)(kSigned ? _mm512_maskz_cvtepi8_epi32(0xffff, v) : _mm512_maskz_cvtepu8_epi32(0xffff, v));
#elif N3_LANES == 8
  const __m128i v = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return (I32)(kSigned ? _mm256_cvtepi8_epi32(v) : _mm256_cvtepu8_epi32(v));
#else
  std::conditional_t<kSigned, I8, U8> v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, I32);
#endif
}

N3_LANE_FN F32 load(const Int8* p) { return __builtin_convertvector(load_bytes<true>(p), F32); }

// As e4m3_to_float.
N3_LANE_FN F32 load(const E4m3* p) {
  const U32 code = (U32)load_bytes<false>(p), m = code & 0x7f;
  const U32 subnormal = (U32)(__builtin_convertvector((I32)m, F32) * 0x1p-9f);
  U32 magnitude = (I32)m < 8 ? subnormal : (m << 20) + (120u << 23);
  magnitude = m == 0x7f ? U32{} + 0x7fc00000 : magnitude;
  return (F32)(magnitude | (code & 0x80) << 24);
}

// A whole vector of stored elements as floats, and back, to nearest even. The hardware's conversions of float16 agree
// with lanes.h's but for the digits of a NaN, which put() makes the same.
template <typename T>
N3_LANE_FN F32 get(const T* p) {
#if N3_LANES == 16
  if constexpr (std::is_same_v<T, Half>) {
    __m256i h;
    std::memcpy(&h, p, sizeof h);
    return (F32)_mm512_maskz_cvtph_ps(0xffff, h);
  }
#elif N3_LANES == 8
  if constexpr (std::is_same_v<T, Half>) {
    __m128i h;
    std::memcpy(&h, p, sizeof h);
    return (F32)_mm256_cvtph_ps(h);
  }
#endif
  return load(p);
}

template <typename T>
N3_LANE_FN void put(T* p, F32 v) {
#if N3_LANES > 4
  if constexpr (std::is_same_v<T, Half>) {
    v = v == v ? v : (F32)(((U32)v & 0x80000000u) | 0x7fc00000);
#if N3_LANES == 16
    const __m256i h = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
    std::memcpy(p, &h, sizeof h);
    return;
  }
#endif
  store(p, v);
}

N3_LANE_FN I32 lane_numbers() {
  I32 v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---- rows of operands

template <typename T>
N3_LANE_FN void widen_row(const T* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
  } else {
    for (; i < n; ++i) to[i] = to_float(from[i * stride]);
  }
}

// n elements from `at` on, as floats, and zeros up to `size`.
void widen(const View& v, int64_t at, int64_t stride, int64_t n, int64_t size, float* to) {
  switch (v.element) {
    case Element::kFloat: widen_row(static_cast<const float*>(v.data) + at, stride, n, to); break;
    case Element::kHalf: widen_row(static_cast<const Half*>(v.data) + at, stride, n, to); break;
    default: widen_row(static_cast<const BFloat16*>(v.data) + at, stride, n, to); break;
  }
  for (int64_t i = n; i < size; ++i) to[i] = 0.f;
}

template <typename T>
N3_LANE_FN void narrow_row(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load(from + i), n - i);
}

// n floats, in memory for whole vectors, to the elements from `at` on, which lie side by side.
void narrow(const View& v, int64_t at, const float* from, int64_t n) {
  switch (v.element) {
    case Element::kFloat: narrow_row(from, n, static_cast<float*>(v.data) + at); break;
    case Element::kHalf: narrow_row(from, n, static_cast<Half*>(v.data) + at); break;
    default: narrow_row(from, n, static_cast<BFloat16*>(v.data) + at); break;
  }
}

// ---- sums over 16 lanes: lanes l and l + 8 first, then l and l + 4, l + 2, l + 1

struct Sum {
  F32 part[kParts] = {};
};

N3_LANE_FN F4 fold(const Sum& s) {
#if N3_LANES == 16
  using F8 = float __attribute__((vector_size(32)));
  const F8 a = __builtin_shufflevector(s.part[0], s.part[0], 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(s.part[0], s.part[0], 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#elif N3_LANES == 8
  const F32 a = s.part[0] + s.part[1];
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
  return (s.part[0] + s.part[2]) + (s.part[1] + s.part[3]);
#endif
}

// The totals of R rows.
template <int R>
N3_LANE_FN void total(const Sum (&sums)[R], float* out) {
  static_assert(R == 4 || R == 1);
  if constexpr (R == 4) {
    const F4 a = fold(sums[0]), b = fold(sums[1]), c = fold(sums[2]), d = fold(sums[3]);
    const F4 ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    const F4 cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    const F4 all = __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
    std::memcpy(out, &all, sizeof all);
  } else {
    const F4 a = fold(sums[0]);
    out[0] = (a[0] + a[2]) + (a[1] + a[3]);
  }
}

// ---- rows of states

// One row, its elements side by side.
template <typename T>
struct Row {
  T* data;
  float scale;  // of 8-bit elements

  N3_LANE_FN F32 get(int64_t i) const { return scaled(ssm_update::get(data + i)); }
  N3_LANE_FN F32 get_some(int64_t i, int64_t n) const { return scaled(load_part(data + i, n)); }
  N3_LANE_FN F32 scaled(F32 v) const {
    if constexpr (kScaled<std::remove_const_t<T>>) return v * scale;
    return v;
  }
};

// Some rows of one head.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;      // from row to row
  const float* scale;  // of the first row; null unless T has 8 bits
  int64_t scale_stride;

  N3_LANE_FN Row<T> row(int64_t r) const { return {data + r * stride, scale ? scale[r * scale_stride] : 1.f}; }
};

template <typename T>
N3_LANE_FN Rows<T> rows_of(const Slot& s, int64_t head, int64_t row) {
  const Layout& l = *s.layout;
  return {static_cast<T*>(s.data) + head * l.state[0] + row * l.state[1], l.state[1],
          s.scale ? s.scale + head * l.scale[0] + row * l.scale[1] : nullptr, l.scale[1]};
}

N3_LANE_FN float element_to_float(float v) { return v; }
N3_LANE_FN float element_to_float(Half v) { return half_to_float(v.bits); }
N3_LANE_FN float element_to_float(BFloat16 v) { return bf16_to_float(v.bits); }
N3_LANE_FN float element_to_float(Int8 v) { return float(v.bits); }
N3_LANE_FN float element_to_float(E4m3 v) { return e4m3_to_float(v.bits); }

// Bytes that a state is asked for ahead, line after line though rows advance together. Updating float32 states in DRAM,
// one core of a Sapphire Rapids (AVX2) moves 12.4 GB/s without and 22 with it, as much as scaling them in place.
constexpr int64_t kAhead = 2816;

// Asks for what is read after R rows of a slot, of which the first is `row`, while column i of them is read.
template <int R, typename T>
N3_LANE_FN void ask_ahead(T* row, int64_t i) {
  if constexpr (std::is_const_v<T>) {  // in a slot, not in the workspace
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + i * R + r * kTile) + kAhead);
    }
  }
}

// R rows of a slot as floats, `pitch` apart.
template <typename T, int R>
void read_rows(const Slot& s, int64_t head, int64_t row, int64_t n, float* to, int64_t pitch) {
  const Rows<const T> rows = rows_of<const T>(s, head, row);
  const int64_t stride = s.layout->state[2];
  for (int r = 0; r < R; ++r) {
    const Row<const T> from = rows.row(r);
    float* out = to + r * pitch;
    int64_t i = 0;
    if (stride == 1) {
      for (; i + kTile <= n; i += kTile) {
        ask_ahead<1>(from.data, i);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) store(out + i + part * kLanes, from.get(i + part * kLanes));
      }
      for (; i + kLanes <= n; i += kLanes) store(out + i, from.get(i));
      if (i < n) store_part(out + i, from.get_some(i, n - i), n - i);
    } else {
      for (; i < n; ++i) out[i] = element_to_float(from.data[i * stride]) * (kScaled<T> ? from.scale : 1.f);
    }
  }
}

// ---- random words

template <size_t... I>
N3_LANE_FN void interleave(U64 a, U64 b, U64& first, U64& second, std::index_sequence<I...>) {
  constexpr int kHalf = kLanes / 2;
  first = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kHalf)...);
  second = __builtin_shufflevector(a, b, (kHalf / 2 + I / 2 + I % 2 * kHalf)...);
}

// The Philox words of elements first .. first + n, as philox4x32 makes them: a counter, of four words, in each lane of
// 64 bits, whose upper half is not kept clean. `room` has space for n + 4 * kTile words.
const uint32_t* random_words(uint64_t key, uint64_t offset, uint64_t first, int64_t n, uint32_t* room) {
  constexpr int kCounters = kLanes / 2, kGroups = 2;
  const PhiloxLanes philox(key);
  U64 lanes;
  for (int i = 0; i < kCounters; ++i) lanes[i] = i;
  uint32_t* out = room;
  const uint64_t end = (first + n + 3) / 4;
  for (uint64_t counter = first / 4; counter < end; counter += kGroups * kCounters, out += kGroups * 2 * kLanes) {
    U64 c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
    for (int i = 0; i < kGroups; ++i) {
      c0[i] = lanes + (counter + i * kCounters), c1[i] = c0[i] >> 32;
      c2[i] = U64{} + offset, c3[i] = c2[i] >> 32;
    }
    philox(c0, c1, c2, c3);
    for (int i = 0; i < kGroups; ++i) {
      const U64 words01 = (c0[i] & 0xffffffff) | c1[i] << 32, words23 = (c2[i] & 0xffffffff) | c3[i] << 32;
      U64 words[2];
      interleave(words01, words23, words[0], words[1], std::make_index_sequence<kCounters>());
      std::memcpy(out + i * 2 * kLanes, words, sizeof words);
    }
  }
  return room + first % 4;
}

// ---- rounding

// The fraction of the way to the next magnitude on the grid that decides a draw, and whether it is taken.
N3_LANE_FN U32 one_if_up(U32 word, F32 fraction) {
  const F32 u = __builtin_convertvector((I32)(word >> 8), F32) * 0x1p-24f;
  return (U32)(u < fraction) & 1;
}

// For a magnitude below 2^kMin, the grid's subnormals of 2^-kDigits; `code` and `fraction` are replaced there.
N3_LANE_FN void round_subnormals(F32 magnitude, float least_normal, float steps, U32& code, F32& fraction) {
  const F32 scaled = magnitude < least_normal ? magnitude * steps : F32{};
  const I32 q = __builtin_convertvector(scaled, I32);
  code = magnitude < least_normal ? (U32)q : code;
  fraction = magnitude < least_normal ? scaled - __builtin_convertvector(q, F32) : fraction;
}

N3_LANE_FN U32 draw(BFloat16, F32 v, U32 word) {
  const U32 bits = (U32)v, b = bits & 0x7fffffff;
  const F32 fraction = __builtin_convertvector((I32)(b & 0xffff), F32) * 0x1p-16f;
  U32 m = (b >> 16) + one_if_up(word, fraction);
  const U32 nearest = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  m = (I32)b > 0x7f7f0000 ? nearest : m;  // beyond the largest finite value
  m = (I32)b > 0x7f800000 ? b >> 16 | 0x40 : m;
  return m | (bits >> 16 & 0x8000);
}

N3_LANE_FN U32 draw(Half, F32 v, U32 word) {
  const U32 bits = (U32)v, b = bits & 0x7fffffff;
  U32 m = (b >> 13) - (112u << 10);
  F32 fraction = __builtin_convertvector((I32)(b & 0x1fff), F32) * 0x1p-13f;
  round_subnormals((F32)b, 0x1p-14f, 0x1p24f, m, fraction);
  m += one_if_up(word, fraction);
  m = (I32)b > 0x477fe000 ? U32{} + 0x7bff : m;  // beyond the largest finite value: to nearest
  m = (I32)b >= 0x477ff000 ? U32{} + 0x7c00 : m;
  m = (I32)b > 0x7f800000 ? U32{} + 0x7e00 : m;
  return m | (bits >> 16 & 0x8000);
}

// Of a value divided by its scale.
N3_LANE_FN U32 draw(Int8, F32 v, U32 word) {
  const F32 magnitude = (F32)((U32)v & 0x7fffffff), a = magnitude > 127.f ? splat(127.f) : magnitude;
  const I32 q = __builtin_convertvector(a, I32);
  const I32 m = q + (I32)one_if_up(word, a - __builtin_convertvector(q, F32));
  return (U32)(v < 0.f ? -m : m) & 0xff;
}

N3_LANE_FN U32 draw(E4m3, F32 v, U32 word) {
  const U32 bits = (U32)v, b = bits & 0x7fffffff;
  U32 m = (b >> 20) - (120u << 3);
  F32 fraction = __builtin_convertvector((I32)(b & 0xfffff), F32) * 0x1p-20f;
  round_subnormals((F32)b, 0x1p-6f, 512.f, m, fraction);
  m += one_if_up(word, fraction);
  m = (I32)m > 0x7e ? U32{} + 0x7e : m;
  return m | (bits >> 24 & 0x80);
}

N3_LANE_FN U32 nearest(Int8, F32 v) {
  const F32 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 inside = v > 127.f ? splat(127.f) : v < -127.f ? splat(-127.f) : v;
  return ((U32)(inside + magic) - (U32)magic) & 0xff;
}

// As e4m3_from_float, of a value that is not NaN.
N3_LANE_FN U32 nearest(E4m3, F32 v) {
  const U32 bits = (U32)v;
  const F32 magnitude = (F32)(bits & 0x7fffffff), a = magnitude > 448.f ? splat(448.f) : magnitude;
  const U32 b = (U32)a;
  const U32 normal = ((b + 0x7ffff + (b >> 20 & 1)) >> 20) - (120u << 3);
  const U32 subnormal = (U32)(a + 16384.f) & 15;  // 2^14 has an ulp of 2^-9
  return (a >= 0.015625f ? normal : subnormal) | (bits >> 24 & 0x80);
}

template <typename T>
N3_LANE_FN void store_codes(T* to, U32 codes, int64_t n) {
  using Codes = std::conditional_t<sizeof(T) == 2, U16, U8>;
#if N3_LANES == 8
  // Codes fit their element, so that saturating packs are plain ones; GCC would take the vector apart.
  const __m128i low = _mm256_castsi256_si128((__m256i)codes), high = _mm256_extracti128_si256((__m256i)codes, 1);
  __m128i packed = _mm_packus_epi32(low, high);
  if constexpr (sizeof(T) == 1) packed = _mm_packus_epi16(packed, packed);
  Codes c;
  std::memcpy(&c, &packed, sizeof c);
#else
  const Codes c = __builtin_convertvector(codes, Codes);
#endif
  if (n >= kLanes) {
    std::memcpy(to, &c, sizeof c);
  } else {
    std::memcpy(to, &c, n * sizeof(T));
  }
}

// amax / `largest` of n floats; NaN where one of them is not finite.
N3_LANE_FN float scale_of(const float* row, int64_t n, float largest) {
  I32 top{};
  int64_t i = 0;
  const auto take = [&](F32 v) {
    const I32 magnitude = (I32)v & 0x7fffffff;  // ordered like the floats; infinity and NaN above all
    top = magnitude > top ? magnitude : top;
  };
  for (; i + kLanes <= n; i += kLanes) take(load(row + i));
  if (i < n) take(load_part(row + i, n - i));
  int32_t amax = 0;
  for (int l = 0; l < kLanes; ++l) amax = top[l] > amax ? top[l] : amax;
  return amax >= 0x7f800000 ? bits_float(0x7fc00000) : bits_float(uint32_t(amax)) / largest;
}

// How a row is stored: `offset` counts the tokens.
struct Rounding {
  const int64_t* seed;  // null: to nearest
  uint64_t offset;
};

// n floats as T, rounded; `first` is the number of the row's first element. `room`: for random words.
template <typename T>
__attribute__((noinline)) void write_row(const float* row, int64_t n, uint64_t first, Rounding rounding, T* to,
                                         float* scale, uint32_t* room) {
  float divisor = 1.f;
  if constexpr (kScaled<T>) {
    divisor = *scale = scale_of(row, n, std::is_same_v<T, Int8> ? 127.f : 448.f);
    if (!(divisor > 0.f)) {
      for (int64_t i = 0; i < n; ++i) to[i] = T{};
      return;
    }
  }
  const auto each = [&](const auto& write) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) write(i, kScaled<T> ? load(row + i) / divisor : load(row + i), kLanes);
    if (i < n) write(i, kScaled<T> ? load_part(row + i, n - i) / divisor : load_part(row + i, n - i), n - i);
  };
  if constexpr (!std::is_same_v<T, float>) {
    if (rounding.seed) {
      const uint64_t key = uint64_t(rounding.seed[0]), offset = uint64_t(rounding.seed[1]) + rounding.offset;
      const uint32_t* words = random_words(key, offset, first, n, room);
      return each([&](int64_t i, F32 v, int64_t some) {
        U32 word;
        std::memcpy(&word, words + i, sizeof word);  // behind the last there is room
        store_codes(to + i, draw(T{}, v, word), some);
      });
    }
  }
  each([&](int64_t i, F32 v, int64_t some) {
    if constexpr (kScaled<T>) {
      store_codes(to + i, nearest(T{}, v), some);
    } else if (some == kLanes) {
      put(to + i, v);
    } else {
      store_part(to + i, v, some);
    }
  });
}

// R rows of floats, `pitch` apart, into a slot. `room`: for a row and its random words.
template <typename T, int R>
void write_rows(const float* from, int64_t pitch, int64_t n, const Slot& s, int64_t head, int64_t row,
                           int64_t head_dim, Rounding rounding, float* room) {
  const Rows<T> rows = rows_of<T>(s, head, row);
  const int64_t stride = s.layout->state[2];
  uint32_t* words = reinterpret_cast<uint32_t*>(room + padded(n));
  for (int r = 0; r < R; ++r) {
    const uint64_t first = s.first + uint64_t((head * head_dim + row + r) * n);
    T* to = rows.data + r * rows.stride;
    float* scale = s.scale ? s.scale + head * s.layout->scale[0] + (row + r) * s.layout->scale[1] : nullptr;
    if (stride == 1) {
      write_row(from + r * pitch, n, first, rounding, to, scale, words);
    } else {
      T* packed = reinterpret_cast<T*>(room);
      write_row(from + r * pitch, n, first, rounding, packed, scale, words);
      for (int64_t i = 0; i < n; ++i) to[i * stride] = packed[i];
    }
  }
}

// Calls body(T{}) with the type that stores an element.
template <typename Body>
N3_LANE_FN void with_element(Element e, const Body& body) {
  switch (e) {
    case Element::kFloat: return body(float{});
    case Element::kHalf: return body(Half{});
    case Element::kBFloat16: return body(BFloat16{});
    case Element::kInt8: return body(Int8{});
    case Element::kE4m3: return body(E4m3{});
  }
}

}  // namespace
}  // namespace n3::ssm_update
