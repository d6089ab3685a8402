// The tile instructions as kernels use them; included by *_amx.cpp alone, which define N3_LANES as 16. amx.h has the
// contract.
#pragma once
#include <algorithm>

#include "amx.h"
#include "lanes.h"

namespace n3::amx {
namespace {

constexpr int64_t kTile = 1024;  // bytes of a whole tile

// The compiler does not know what memory the tile instructions read and write.
N3_LANE_FN void tiles_see_memory(const void* p = nullptr) { asm volatile("" ::"r"(p) : "memory"); }

// Tiles 0 to 3 are accumulators, number r + 2 * t of weights 4 + r and tokens 6 + t. In memory they follow each other:
// for every tile of tokens 32 rows of 16 floats.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// For `rows` weight rows, up to 32, and tiles of `width` tokens. Unused tiles are configured like the others.
inline void configure(int64_t rows, int64_t width) {
  const int64_t low = std::min(rows, kTileRows), high = rows > kTileRows ? rows - kTileRows : kTileRows;
  Config config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = uint8_t(i >= 6 ? kTileRows : i % 2 ? high : low);
    config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 2 * kStep : 4 * width);
  }
  tiles_see_memory(&config);
  _tile_loadconfig(&config);
}

// The products of 1 or 2 tiles of weights and of tokens.
template <int kRows, int kTokens>
struct Tiles {
  static constexpr bool kBoth = kRows > 1 && kTokens > 1;

  static void zero() {
    _tile_zero(0);
    if constexpr (kRows > 1) _tile_zero(1);
    if constexpr (kTokens > 1) _tile_zero(2);
    if constexpr (kBoth) _tile_zero(3);
  }

  static void load(const char* acc) {
    tiles_see_memory();
    _tile_loadd(0, acc, 64);
    if constexpr (kRows > 1) _tile_loadd(1, acc + kTile, 64);
    if constexpr (kTokens > 1) _tile_loadd(2, acc + 2 * kTile, 64);
    if constexpr (kBoth) _tile_loadd(3, acc + 3 * kTile, 64);
  }

  static void store(char* acc) {
    _tile_stored(0, acc, 64);
    if constexpr (kRows > 1) _tile_stored(1, acc + kTile, 64);
    if constexpr (kTokens > 1) _tile_stored(2, acc + 2 * kTile, 64);
    if constexpr (kBoth) _tile_stored(3, acc + 3 * kTile, 64);
    tiles_see_memory();
  }

  // Weight rows lie w_row bytes apart. Calls between(0 .. 2 * kRows) on the way: spread out, so that neither loads nor
  // products wait for each other.
  template <typename Between>
  N3_LANE_FN static void multiply(const char* w, int64_t w_row, const char* x0, const char* x1, int64_t x_row,
                                  const Between& between) {
    tiles_see_memory();
    _tile_loadd(6, x0, x_row);
    between(0);
    _tile_loadd(4, w, w_row);
    between(1);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRows > 1) {
      _tile_loadd(5, w + kTileRows * w_row, w_row);
      between(2);
    }
    if constexpr (kTokens > 1) _tile_loadd(7, x1, x_row);
    if constexpr (kRows > 1) {
      between(3);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (kTokens > 1) _tile_dpbf16ps(2, 4, 7);
    if constexpr (kBoth) _tile_dpbf16ps(3, 5, 7);
  }
};

// ---- transposition of 16 x 16 words of 32 bits

// With masks of ones: GCC 12 warns of what the plain intrinsics leave undefined.
#define N3_UNPACK(half, bits, a, b) _mm512_maskz_unpack##half##_epi##bits(-1, a, b)
#define N3_QUARTERS(a, b, which) _mm512_maskz_shuffle_i32x4(-1, a, b, which)

N3_LANE_FN void transpose(__m512i (&v)[16]) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 words in every quarter
    const __m512i low0 = N3_UNPACK(lo, 32, v[i], v[i + 1]), low1 = N3_UNPACK(lo, 32, v[i + 2], v[i + 3]);
    const __m512i high0 = N3_UNPACK(hi, 32, v[i], v[i + 1]), high1 = N3_UNPACK(hi, 32, v[i + 2], v[i + 3]);
    a[i] = N3_UNPACK(lo, 64, low0, low1), a[i + 1] = N3_UNPACK(hi, 64, low0, low1);
    a[i + 2] = N3_UNPACK(lo, 64, high0, high1), a[i + 3] = N3_UNPACK(hi, 64, high0, high1);
  }
  for (int i = 0; i < 4; ++i) {  // 4 x 4 quarters
    const __m512i even0 = N3_QUARTERS(a[i], a[i + 4], 0x88), even1 = N3_QUARTERS(a[i + 8], a[i + 12], 0x88);
    const __m512i odd0 = N3_QUARTERS(a[i], a[i + 4], 0xdd), odd1 = N3_QUARTERS(a[i + 8], a[i + 12], 0xdd);
    v[i] = N3_QUARTERS(even0, even1, 0x88), v[i + 8] = N3_QUARTERS(even0, even1, 0xdd);
    v[i + 4] = N3_QUARTERS(odd0, odd1, 0x88), v[i + 12] = N3_QUARTERS(odd0, odd1, 0xdd);
  }
}

#undef N3_UNPACK
#undef N3_QUARTERS

// to[token][row] from accumulators, times a factor.
inline void to_rows(const char* acc, float factor, int64_t rows, int64_t tokens, float* const* to) {
  for (int64_t t0 = 0; t0 < tokens; t0 += kTileTokens, acc += 2 * kTile) {
    const int64_t n = std::min(kTileTokens, tokens - t0);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      __m512i v[16];
      for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(acc + (r + i) * 64);
      transpose(v);
      const __mmask16 some = rows - r < kTileRows ? __mmask16((1u << (rows - r)) - 1) : 0xffff;
      for (int64_t t = 0; t < n; ++t) {
        _mm512_mask_storeu_epi32(to[t0 + t] + r, some, (__m512i)((F32)v[t] * factor));
      }
    }
  }
}

// ---- packing

// Of the elements of k in the pairs of a step: as they come, or as codes of NVFP4 are decoded, where word
// 16 * b + 4 * i + j is element 16 * b + 4 * j + i.
struct Order {
  uint16_t element[kStep];
  constexpr uint16_t operator[](int i) const { return element[i]; }
};

constexpr Order make_order(bool nvfp4) {
  Order order{};
  for (int w = 0; w < kStep; ++w) order.element[w] = uint16_t(nvfp4 ? w / 16 * 16 + w % 4 * 4 + w % 16 / 4 : w);
  return order;
}

constexpr Order kInOrder = make_order(false), kNvfp4Order = make_order(true);

// Packs rows[0 .. count] of bfloat16 as a tile of `width` tokens.
inline void pack_tile(const Order& order, const void* const* rows, int64_t count, int64_t k, int64_t width,
                      void* tile) {
  const __m512i pairs = _mm512_loadu_si512(order.element);
  const __mmask16 columns = __mmask16((1u << width) - 1);
  auto* to = static_cast<uint32_t*>(tile);
  for (int64_t begin = 0; begin < k; begin += kStep, to += 16 * width) {
    const __mmask32 elements = k - begin < kStep ? (1u << (k - begin)) - 1 : 0xffffffff;
    const auto load = [&](int64_t t) {
      const auto* row = static_cast<const uint16_t*>(rows[t]) + begin;
      return _mm512_permutexvar_epi16(pairs, _mm512_maskz_loadu_epi16(elements, row));
    };
    if (width == 1) {
      _mm512_storeu_si512(to, load(0));
      continue;
    }
    __m512i v[16];
    for (int t = 0; t < 16; ++t) v[t] = t < count ? load(t) : _mm512_setzero_si512();
    transpose(v);
    for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(to + i * width, columns, v[i]);
  }
}

// v = high + low, but for the last bits of low, which is not rounded yet. Infinity and NaN are in the high part, as a
// word of 16 bits.
N3_LANE_FN U32 split_words(F32 v, F32& low) {
  const U32 words = to_words(BFloat16{}, v);
  const F32 high = from_words(BFloat16{}, words);
  low = high - high == 0.f ? v - high : F32{};
  return words;
}

}  // namespace
}  // namespace n3::amx
