// 16 codes of a token, for both vector forms of gemm_lanes.h.
#pragma once
#include <immintrin.h>

#include "gemm_lanes.h"

namespace n3::nvfp4_gemm {
namespace {

// Doubled codes in the order of a strip: the low nibbles of 8 bytes, then the high ones. Returns their sum.
inline int32_t expand_block(const uint8_t* q, int8_t* out) {
  uint64_t codes;
  std::memcpy(&codes, q, 8);
  constexpr uint64_t kLow = 0x0f0f0f0f0f0f0f0f;
  const __m128i both = _mm_set_epi64x(int64_t(codes >> 4 & kLow), int64_t(codes & kLow));
  const __m128i values = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kDoubled)), both);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), values);
  const __m128i sums = _mm_sad_epu8(_mm_add_epi8(values, _mm_set1_epi8(kOffset)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * kOffset;
}

}  // namespace
}  // namespace n3::nvfp4_gemm
