// The portable form of linear_lanes.h; std::fma keeps the bits of the vector forms.
#pragma once
#include <cmath>

#include "linear_lanes.h"

namespace n3::nvfp4_linear {
namespace {

struct Generic {
  struct Vec {
    float lane[16];
  };
  struct Table {
    float values[256][16];
  };
  static constexpr int kLanes = 16;
  static constexpr int kStreamTokens = 3;
  static constexpr int kTileOutputs = 12;
  static constexpr int64_t kPanelBytes = 128 << 10;
  static constexpr int64_t kBlockBytes = 16 << 10;   // of them in level 1
  static constexpr int kReduce = 1;

  static constexpr uint8_t kOrder[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                         16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

  static Vec zero() { return {}; }

  static Vec load(const float* p) {
    Vec v;
    std::copy_n(p, 16, v.lane);
    return v;
  }

  static void store(float* p, const Vec& v) { std::copy_n(v.lane, 16, p); }

  static Vec fma(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < 16; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return c;
  }

  static void prepare(const Values& values, void* out) {
    std::copy_n(&values[0][0], 256 * 16, &static_cast<Table*>(out)->values[0][0]);
  }

  static void decode(const Table& table, const uint8_t* q, const uint8_t* scale, Vec (&w)[2]) {
    for (int i = 0; i < 32; ++i) w[i / 16].lane[i % 16] = table.values[scale[i / 16]][q[i / 2] >> i % 2 * 4 & 15];
  }

  static void reduce(const float* acc, float* out) {
    float lane[4];
    for (int i = 0; i < 4; ++i) {
      const auto residues = [&](const float* a) { return (a[4 * i] + a[4 * i + 2]) + (a[4 * i + 1] + a[4 * i + 3]); };
      lane[i] = residues(acc) + residues(acc + 16);
    }
    out[0] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
};

}  // namespace
}  // namespace n3::nvfp4_linear
