// AVX-512 with VNNI: vpdpbusd adds four products of bytes to each dword, so a block of 16 rows is four instructions.
#include <immintrin.h>

#include "gemm_expand.h"

namespace n3::nvfp4_gemm {
namespace {

struct Vnni {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kStrips = 4;
  static constexpr int kTileStrips = 2;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const float* p) { return _mm512_load_ps(p); }
  static Int load_bytes(const void* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float scaled(Float v, float s) { return _mm512_mul_ps(v, _mm512_set1_ps(s)); }

  static Float dots(const Int (&w)[4], const int8_t* a, int32_t init) {
    int32_t four[4];
    std::memcpy(four, a, 16);
    Int sum = _mm512_set1_epi32(init);
    for (int i = 0; i < 4; ++i) sum = _mm512_dpbusd_epi32(sum, w[i], _mm512_set1_epi32(four[i]));
    return _mm512_cvtepi32_ps(sum);
  }

  static int32_t expand(const uint8_t* q, int8_t* out) { return expand_block(q, out); }

  static void transpose(Int (&v)[16]) {
    Int t[16];
    for (int i = 0; i < 16; i += 4) {
      const Int a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
      const Int c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
      t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
      t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    // t[4 i + j]: dwords j, j + 4, j + 8, j + 12 of rows 4 i ... 4 i + 3, by quarters.
    for (int j = 0; j < 4; ++j) {
      const Int a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x44), b = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xee);
      const Int c = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x44);
      const Int d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xee);
      v[j] = _mm512_shuffle_i32x4(a, c, 0x88), v[j + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
      v[j + 8] = _mm512_shuffle_i32x4(b, d, 0x88), v[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
  }

  static void decode(Int first, Int second, uint8_t (*out)[64]) {
    const __m128i doubled = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kDoubled));
    const Int table = _mm512_broadcast_i32x4(_mm_add_epi8(doubled, _mm_set1_epi8(kOffset)));
    const Int low = _mm512_set1_epi8(15);
    const auto put = [&](int i, Int codes) {
      _mm512_store_si512(out[i], _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low)));
    };
    put(0, first), put(1, second);
    put(2, _mm512_srli_epi32(first, 4)), put(3, _mm512_srli_epi32(second, 4));
  }

  // e4m3 bits are those of a half 2^-8 as large, seven places up; NaN apart.
  static void scales(const uint32_t* four, int shift, float* out) {
    const Int bytes = _mm512_srl_epi32(_mm512_load_si512(four), _mm_cvtsi32_si128(shift));
    const Int magnitude = _mm512_and_si512(bytes, _mm512_set1_epi32(0x7f));
    const Int sign = _mm512_and_si512(bytes, _mm512_set1_epi32(0x80));
    const Int half = _mm512_or_si512(_mm512_slli_epi32(magnitude, 7), _mm512_slli_epi32(sign, 8));
    const Float value = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half)), _mm512_set1_ps(256.f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
    _mm512_store_ps(out, _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000))));
  }
};

}  // namespace

const Kernels kVnniKernels = kernels_of<Vnni>();

}  // namespace n3::nvfp4_gemm
