// NVFP4 codes as operand a of warpgroup products, in bfloat16 or float16: e2m1 * e4m3 * 2^-8, exact in both. The order
// of k is position_of's (experts_nvfp4_plan.h): a thread has 32 neighbouring k of two rows, two whole scale blocks.
#pragma once
#include "../common/hopper.cuh"
#include "experts_nvfp4_plan.h"

namespace n3::moe_experts::sm90::nvfp4 {

// e4m3 scales [experts, rows, columns]; strides in bytes.
struct Scales {
  const uint8_t* data;
  int64_t expert_stride, row_stride;
  const float* global;  // [experts]
};

// Codes c and c + 4 of a word in the halves of a register: bfloat16 times 2^-126, float16 times 2^-14.
template <typename T, int c>
N3_DEVICE uint32_t codes_of(uint32_t w) {
  if constexpr (std::is_same_v<T, device::BF16>) {
    return codes_bf16<c>(w);
  } else {
    constexpr int kUp = 9 - 4 * c;
    return (w << (12 - 4 * c) & 0x80008000) | ((kUp > 0 ? w << (kUp & 31) : w >> (-kUp & 31)) & 0x0e000e00);
  }
}

// Bytes kFirst and kFirst + 1, e4m3 scales, halved, times the lower half of `factor`, as bfloat16: exact. Their bits
// are those of a bfloat16 2^120 times as small, subnormals too; but NaN's are those of a number.
template <int kFirst>
N3_DEVICE uint32_t factors_of(uint32_t bytes, uint32_t factor) {
  const uint32_t x = device::spread_bytes<kFirst>(bytes);
  const uint32_t magnitude = x << 4 & 0x07f007f0, nan = (magnitude + 0x00100010) & 0x08000800;
  const uint32_t scale = device::scale_pair<device::BF16, 0>(magnitude | (x << 8 & 0x80008000), 0x7b00);  // by 2^119
  return device::scale_pair<device::BF16, 0>(scale, factor) | ((nan << 4) - (nan >> 5));
}

// The factors of two blocks from their scales. float16 has no room for the global scale's power of two: its sums do not
// pass float32 either.
template <typename T>
N3_DEVICE uint32_t factors_of(uint32_t bytes, uint32_t factor) {
  if constexpr (std::is_same_v<T, device::BF16>) {
    return factors_of<0>(bytes, factor);
  } else {  // the bits of an e4m3 are those of a float16 2^8 times as small, but NaN's are those of a number
    const uint32_t x = device::spread_bytes<0>(bytes);
    const uint32_t magnitude = x << 7 & 0x3f803f80, nan = (magnitude + 0x00800080) & 0x40004000;
    return device::scale_pair<device::F16, 0>(magnitude | (x << 8 & 0x80008000), 0x7400) | ((nan << 1) - (nan >> 7));
  }
}

// A group's global scale: what goes into the factors, and what is left for the sums.
template <typename T>
N3_DEVICE Global global_for(float global) {
  if constexpr (std::is_same_v<T, device::BF16>) return global_of(global);
  return {0, global};
}

// A thread's part of 64 rows by 128 k: of rows g and g + 8 of operand a, and the factors of their two blocks.
struct Piece {
  uint4 codes[2];
  uint32_t factors[2];
};

// Operand a of the product kStep, 0 .. 7.
template <typename T, int kStep>
N3_DEVICE void decode(const Piece& p, uint32_t (&a)[4]) {
  constexpr int kWord = kStep / 2, kCode = kStep % 2 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4& v = p.codes[half];
    const uint32_t word = kWord == 0 ? v.x : kWord == 1 ? v.y : kWord == 2 ? v.z : v.w;
    a[half] = device::scale_pair<T, kWord / 2>(codes_of<T, kCode>(word), p.factors[half]);
    a[2 + half] = device::scale_pair<T, kWord / 2>(codes_of<T, kCode + 1>(word), p.factors[half]);
  }
  hopper::pin(a);
}

}  // namespace n3::moe_experts::sm90::nvfp4
