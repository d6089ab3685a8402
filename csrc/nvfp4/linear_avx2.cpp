// AVX2: e2m1 * e4m3 * 2^e is exact in bfloat16, so each scale byte has two 16-byte tables, the low and the high bytes
// of its 16 values, and one block fills one 128-bit lane: 13 integer instructions decode and scale 32 weights.
#include <immintrin.h>

#include "linear_lanes.h"

namespace n3::nvfp4_linear {
namespace {

struct Avx2 {
  using Vec = __m256;
  struct alignas(64) Table {
    uint8_t bytes[256][2][16];
  };
  static constexpr int kLanes = 8;
  static constexpr int kStreamTokens = 3;
  static constexpr int kTileOutputs = 12;           // accumulators, of 16 registers
  static constexpr int64_t kPanelBytes = 520 << 10;  // decoded weights, in a level-2 cache of 512 KiB or more
  static constexpr int64_t kBlockBytes = 16 << 10;   // of them in a level-1 cache
  static constexpr int kReduce = 4;

  // Stream s, lanes 0..3 and 4..7: elements r, r + 4, r + 8, r + 12 of the even and of the odd block, r = 0, 2, 1, 3.
  static constexpr uint8_t kOrder[32] = {0, 4, 8,  12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26, 30,
                                         1, 5, 9,  13, 17, 21, 25, 29, 3, 7, 11, 15, 19, 23, 27, 31};

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static void prepare(const Values& values, void* out) {
    Table& table = *static_cast<Table*>(out);
    const __m128i pick = _mm_setr_epi8(2, 6, 10, 14, 3, 7, 11, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int s = 0; s < 256; ++s) {
      __m128i quads[4];  // 4 low bytes, 4 high bytes
      for (int i = 0; i < 4; ++i) {
        quads[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values[s] + 4 * i)), pick);
      }
      const __m128i a = _mm_unpacklo_epi32(quads[0], quads[1]), b = _mm_unpacklo_epi32(quads[2], quads[3]);
      _mm_store_si128(reinterpret_cast<__m128i*>(table.bytes[s][0]), _mm_unpacklo_epi64(a, b));
      _mm_store_si128(reinterpret_cast<__m128i*>(table.bytes[s][1]), _mm_unpackhi_epi64(a, b));
    }
  }

  static __m256i two_tables(const Table& table, const uint8_t* scale, int half) {
    const auto* even = reinterpret_cast<const __m128i*>(table.bytes[scale[0]][half]);
    const auto* odd = reinterpret_cast<const __m128i*>(table.bytes[scale[1]][half]);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(even)), _mm_load_si128(odd), 1);
  }

  static void decode(const Table& table, const uint8_t* q, const uint8_t* scale, Vec (&w)[4]) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    const __m256i twice = _mm256_permute4x64_epi64(_mm256_castsi128_si256(packed), 0x50);
    const __m256i shifted = _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 4, 0, 4));
    const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8(15));  // per lane: even elements, odd elements
    const __m256i low = _mm256_shuffle_epi8(two_tables(table, scale, 0), codes);
    const __m256i high = _mm256_shuffle_epi8(two_tables(table, scale, 1), codes);
    const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);  // bfloat16
    const __m256i top = _mm256_set1_epi32(int(0xffff0000));
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(even, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(even, top));
    w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(odd, 16));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(odd, top));
  }

  // 4 outputs.
  static void reduce(const float* acc, float* out) {
    Vec v[4];
    for (int i = 0; i < 4; ++i) {
      const float* a = acc + i * kChunk;
      v[i] = _mm256_add_ps(_mm256_add_ps(load(a), load(a + 8)), _mm256_add_ps(load(a + 16), load(a + 24)));
    }
    const auto parities = [](Vec a, Vec b) {
      return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    };
    const Vec ab = parities(v[0], v[1]), cd = parities(v[2], v[3]);
    // [a0+a2 a1+a3 c0+c2 c1+c3 | b.. d..]
    const Vec halves = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    const Vec whole = _mm256_hadd_ps(halves, halves);  // [a c a c | b d b d]
    _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1)));
  }
};

}  // namespace

const Kernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace n3::nvfp4_linear
