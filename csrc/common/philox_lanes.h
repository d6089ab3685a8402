// philox4x32 of philox.h in vectors: one counter, four words, in each lane of 64 bits.
#pragma once
#include "lanes64.h"
#include "philox.h"

namespace n3 {
namespace {

// The products of the lower words of every lane with m.
N3_LANE_FN U64 multiply_low(U64 a, uint32_t m) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)(U64{} + m));
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (kLanes == 8) return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)(U64{} + m));
#endif
  return (a & 0xffffffff) * m;
}

class PhiloxLanes {
 public:
  explicit PhiloxLanes(uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (auto& k : keys_) {
      k[0] = U64{} + k0, k[1] = U64{} + k1;
      k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
  }

  // Counters in, words out, of kGroups vectors at a time: two hide some latency of the products. Only the lower halves
  // of the lanes count, and the upper halves are not kept clean.
  template <int kGroups>
  N3_LANE_FN void operator()(U64 (&c0)[kGroups], U64 (&c1)[kGroups], U64 (&c2)[kGroups], U64 (&c3)[kGroups]) const {
#pragma GCC unroll 1
    for (const auto& k : keys_) {
#pragma GCC unroll 4
      for (int i = 0; i < kGroups; ++i) {
        const U64 p0 = multiply_low(c0[i], 0xd2511f53u), p1 = multiply_low(c2[i], 0xcd9e8d57u);
        c0[i] = p1 >> 32 ^ c1[i] ^ k[0], c1[i] = p1;
        c2[i] = p0 >> 32 ^ c3[i] ^ k[1], c3[i] = p0;
      }
    }
  }

 private:
  U64 keys_[10][2];  // of every round
};

}  // namespace
}  // namespace n3
