// AVX-512: vpermps looks 16 codes up in the 16 scaled values of their block, reading the low 4 bits of each lane, so a
// block is decoded and scaled by one shift and one permutation.
#include <immintrin.h>

#include "linear_lanes.h"

namespace n3::nvfp4_linear {
namespace {

struct Avx512 {
  using Vec = __m512;
  struct alignas(64) Table {
    float values[256][16];
  };
  static constexpr int kLanes = 16;
  static constexpr int kStreamTokens = 4;
  static constexpr int kTileOutputs = 24;           // accumulators, of 32 registers
  static constexpr int64_t kPanelBytes = 512 << 10;  // decoded weights, in a level-2 cache of 1 MiB or more
  static constexpr int64_t kBlockBytes = 16 << 10;   // of them in a level-1 cache
  static constexpr int kReduce = 16;

  // Stream p is the block of parity p; quarter g of it holds elements r, r + 8, r + 4, r + 12, r = 0, 2, 1, 3.
  static constexpr uint8_t kOrder[32] = {0,  8,  4,  12, 2,  10, 6,  14, 1,  9,  5,  13, 3,  11, 7,  15,
                                         16, 24, 20, 28, 18, 26, 22, 30, 17, 25, 21, 29, 19, 27, 23, 31};

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static void prepare(const Values& values, void* out) {
    std::copy_n(&values[0][0], 256 * 16, &static_cast<Table*>(out)->values[0][0]);
  }

  static void decode(const Table& table, const uint8_t* q, const uint8_t* scale, Vec (&w)[2]) {
    // Even lanes hold codes 0..7 of the block, odd lanes 8..15.
    const __m512i shifts = _mm512_setr_epi32(0, 0, 16, 16, 8, 8, 24, 24, 4, 4, 20, 20, 12, 12, 28, 28);
    for (int p = 0; p < 2; ++p) {
      long long codes;
      __builtin_memcpy(&codes, q + 8 * p, 8);
      const __m512i index = _mm512_srlv_epi32(_mm512_set1_epi64(codes), shifts);
      w[p] = _mm512_permutexvar_ps(index, _mm512_load_ps(table.values[scale[p]]));
    }
  }

  // [a b] -> [a0+a1 a2+a3 b0+b1 b2+b3] in quarters.
  static Vec add_quarters(Vec a, Vec b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }

  // 16 outputs.
  static void reduce(const float* acc, float* out) {
    Vec fours[4];  // quarter i: the 4 lanes of output 4 * j + i that are left
    for (int j = 0; j < 4; ++j) {
      Vec parity[2];
      for (int p = 0; p < 2; ++p) {
        const float* a = acc + 4 * j * kChunk + p * kLanes;
        parity[p] = add_quarters(add_quarters(load(a), load(a + kChunk)),
                                 add_quarters(load(a + 2 * kChunk), load(a + 3 * kChunk)));
      }
      fours[j] = _mm512_add_ps(parity[0], parity[1]);
    }
    const auto neighbours = [](Vec a, Vec b) {
      return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    };
    const Vec sums = neighbours(neighbours(fours[0], fours[1]), neighbours(fours[2], fours[3]));
    // Lane 4 * i + j is output 4 * j + i.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    store(out, _mm512_permutexvar_ps(order, sums));
  }
};

}  // namespace

const Kernels kAvx512Kernels = kernels_of<Avx512>();

}  // namespace n3::nvfp4_linear
