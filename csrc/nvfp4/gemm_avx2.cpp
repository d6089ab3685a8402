// AVX2: vpmaddubsw adds two products of bytes to each word. Four of its results stay below 2^12 and are added as words.
#include <immintrin.h>

#include "gemm_expand.h"

namespace n3::nvfp4_gemm {
namespace {

struct Avx2 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kStrips = 8;
  static constexpr int kTileStrips = 1;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const float* p) { return _mm256_load_ps(p); }
  static Int load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float scaled(Float v, float s) { return _mm256_mul_ps(v, _mm256_set1_ps(s)); }

  static Float dots(const Int (&w)[4], const int8_t* a, int32_t init) {
    int32_t four[4];
    std::memcpy(four, a, 16);
    Int sum = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(four[0]));
    for (int i = 1; i < 4; ++i) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(four[i])));
    }
    const Int dots = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(dots, _mm256_set1_epi32(init)));
  }

  static int32_t expand(const uint8_t* q, int8_t* out) { return expand_block(q, out); }

  static void transpose(Int (&v)[8]) {
    Int t[8];
    for (int i = 0; i < 8; i += 4) {
      const Int a = _mm256_unpacklo_epi32(v[i], v[i + 1]), b = _mm256_unpackhi_epi32(v[i], v[i + 1]);
      const Int c = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
      t[i] = _mm256_unpacklo_epi64(a, c), t[i + 1] = _mm256_unpackhi_epi64(a, c);
      t[i + 2] = _mm256_unpacklo_epi64(b, d), t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    // t[4 i + j]: dwords j and j + 4 of rows 4 i ... 4 i + 3, by halves.
    for (int j = 0; j < 4; ++j) {
      v[j] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x20);
      v[j + 4] = _mm256_permute2x128_si256(t[j], t[4 + j], 0x31);
    }
  }

  static void decode(Int first, Int second, uint8_t (*out)[32]) {
    const __m128i doubled = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kDoubled));
    const Int table = _mm256_broadcastsi128_si256(_mm_add_epi8(doubled, _mm_set1_epi8(kOffset)));
    const Int low = _mm256_set1_epi8(15);
    const auto put = [&](int i, Int codes) {
      _mm256_store_si256(reinterpret_cast<Int*>(out[i]), _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low)));
    };
    put(0, first), put(1, second);
    put(2, _mm256_srli_epi32(first, 4)), put(3, _mm256_srli_epi32(second, 4));
  }

  // e4m3 bits are those of a half 2^-8 as large, seven places up; NaN apart.
  static void scales(const uint32_t* four, int shift, float* out) {
    const Int bytes = _mm256_srl_epi32(_mm256_load_si256(reinterpret_cast<const Int*>(four)), _mm_cvtsi32_si128(shift));
    const Int magnitude = _mm256_and_si256(bytes, _mm256_set1_epi32(0x7f));
    const Int sign = _mm256_and_si256(bytes, _mm256_set1_epi32(0x80));
    const Int half = _mm256_or_si256(_mm256_slli_epi32(magnitude, 7), _mm256_slli_epi32(sign, 8));
    const Int words = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    const Float value = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_set1_ps(256.f));
    const Float nan = _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)));
    _mm256_store_ps(out, _mm256_or_ps(value, nan));
  }
};

}  // namespace

const Kernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace n3::nvfp4_gemm
