// Decoding of one 16-element block on the CPU, shared by dequantize and embedding.
#pragma once
#include <array>
#include <cstring>

#include "../common/cpu.h"

namespace n3 {

// Both values of every code byte.
inline constexpr auto kPairs = [] {
  constexpr float magnitude[8] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};
  std::array<std::array<float, 2>, 256> pairs{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int i = 0; i < 2; ++i) {
      const int code = byte >> 4 * i & 15;
      pairs[byte][i] = code & 8 ? -magnitude[code & 7] : magnitude[code & 7];
    }
  }
  return pairs;
}();

// y = (e2m1 * scale) * global for the 16 codes at q.
template <typename T>
inline void decode_block(const uint8_t* q, float scale, float global, T* y) {
  float v[16];
  for (int i = 0; i < 8; ++i) std::memcpy(v + 2 * i, kPairs[q[i]].data(), 8);
  for (int i = 0; i < 16; ++i) y[i] = from_float<T>(v[i] * scale * global);
}

}  // namespace n3
