// Decoding on the device, shared by dequantize, embedding and linear.
#pragma once
#include "../common/device.cuh"

namespace n3::nvfp4 {

// The two codes of a byte as halves of 2^-14 times their values: s e1 e0 m belong at bits 15 and 11..9 of a half, where
// 0.5 is a subnormal. The low nibble lands in the lower half.
N3_HD uint32_t e2m1_pair_bits(uint32_t byte) {
  const uint32_t spread = byte | byte << 12;
  return (spread & 0x00070007) << 9 | (spread & 0x00080008) << 12;
}
constexpr float kPairFactor = 16384.f;  // 2^14, what e2m1_pair_bits leaves out

// 2^-14 times the values of the two codes of a byte.
N3_DEVICE void e2m1_pair(uint32_t byte, float& low, float& high) {
  const uint32_t bits = e2m1_pair_bits(byte);
  low = device::widen(device::F16{uint16_t(bits)});
  high = device::widen(device::F16{uint16_t(bits >> 16)});
}

// v = (code * scale) * global for the 16 codes of one block: the product in brackets is exact.
N3_DEVICE void decode_block(uint2 q, float scale, float global, float (&v)[16]) {
  const float factor = scale * kPairFactor;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float low, high;
    e2m1_pair((i < 4 ? q.x : q.y) >> 8 * (i % 4) & 0xff, low, high);
    v[2 * i] = low * factor * global;
    v[2 * i + 1] = high * factor * global;
  }
}

}  // namespace n3::nvfp4
