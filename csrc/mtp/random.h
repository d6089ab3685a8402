// The draws of the mtp family: pure functions of (seed, pos, stream, index); the twin of n3kernels/_philox.py.
#pragma once
#include <cmath>

#include "../common/philox.h"
#include "plan.h"

namespace n3::mtp {

// The words of indices index / 4 * 4 up to index / 4 * 4 + 3.
inline Philox4 words(int64_t seed, int64_t pos, Stream stream, int64_t index) {
  return philox4x32(uint64_t(seed), uint64_t(pos), uint32_t(stream) << 28 | uint32_t(index >> 2));
}

inline double uniform_of(uint32_t word) { return (word + 0.5) * 0x1p-32; }

inline double gumbel_of(uint32_t word) {
  const double u = uniform_of(word);
  return -std::log(u > 0.5 ? -std::log1p(-(1 - u)) : -std::log(u));
}

inline double uniform(int64_t seed, int64_t pos, Stream stream, int64_t index) {
  return uniform_of(words(seed, pos, stream, index).word[index & 3]);
}

inline double gumbel(int64_t seed, int64_t pos, Stream stream, int64_t index) {
  return gumbel_of(words(seed, pos, stream, index).word[index & 3]);
}

// 53 bits in (0, 1), from words 0 and 1 of index 0.
inline double uniform53(int64_t seed, int64_t pos, Stream stream) {
  const Philox4 w = words(seed, pos, stream, 0);
  return ((w.word[0] >> 5) * 0x1p26 + (w.word[1] >> 6) + 0.5) * 0x1p-53;
}

}  // namespace n3::mtp
