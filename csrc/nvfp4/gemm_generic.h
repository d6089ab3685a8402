// The portable form of gemm_lanes.h; std::fma keeps the bits of the vector forms.
#pragma once
#include <cmath>

#include "gemm_lanes.h"

namespace n3::nvfp4_gemm {
namespace {

struct Generic {
  static constexpr int kLanes = 8;
  static constexpr int kStrips = 8;
  static constexpr int kTileStrips = 1;
  struct Int {
    uint8_t byte[kLanes * 4];
  };
  struct Float {
    float lane[kLanes];
  };

  static Float zero() { return {}; }

  static Float load(const float* p) {
    Float v;
    std::copy_n(p, kLanes, v.lane);
    return v;
  }

  static Int load_bytes(const void* p) {
    Int v;
    std::memcpy(v.byte, p, sizeof v.byte);
    return v;
  }

  static void store(float* p, const Float& v) { std::copy_n(v.lane, kLanes, p); }

  static Float fma(const Float& a, const Float& b, Float c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
  }

  static Float scaled(Float v, float s) {
    for (float& lane : v.lane) lane *= s;
    return v;
  }

  static Float dots(const Int (&w)[4], const int8_t* a, int32_t init) {
    Float v;
    for (int r = 0; r < kLanes; ++r) {
      int32_t sum = init;
      for (int i = 0; i < 16; ++i) sum += w[i / 4].byte[4 * r + i % 4] * a[i];
      v.lane[r] = float(sum);
    }
    return v;
  }

  static int32_t expand(const uint8_t* q, int8_t* out) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += out[i] = kDoubled[q[i % 8] >> i / 8 * 4 & 15];
    return sum;
  }

  static void transpose(Int (&v)[kLanes]) {
    Int t[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      for (int r = 0; r < kLanes; ++r) std::memcpy(t[i].byte + 4 * r, v[r].byte + 4 * i, 4);
    }
    std::copy_n(t, kLanes, v);
  }

  static void decode(const Int& first, const Int& second, uint8_t (*out)[kLanes * 4]) {
    for (int i = 0; i < kLanes * 4; ++i) {
      out[0][i] = uint8_t(kDoubled[first.byte[i] & 15] + kOffset);
      out[1][i] = uint8_t(kDoubled[second.byte[i] & 15] + kOffset);
      out[2][i] = uint8_t(kDoubled[first.byte[i] >> 4] + kOffset);
      out[3][i] = uint8_t(kDoubled[second.byte[i] >> 4] + kOffset);
    }
  }

  static void scales(const uint32_t* four, int shift, float* out) {
    for (int r = 0; r < kLanes; ++r) out[r] = e4m3_to_float(uint8_t(four[r] >> shift));
  }
};

}  // namespace
}  // namespace n3::nvfp4_gemm
