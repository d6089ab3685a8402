// The draws of the mtp family: pure functions of (seed, pos, stream, index), on host and device; the twin of
// n3kernels/_philox.py.
#pragma once
#include <cmath>

#include "../common/philox.h"
#include "plan.h"

namespace n3::mtp {

// The words of indices index / 4 * 4 up to index / 4 * 4 + 3.
N3_HD Philox4 words(int64_t seed, int64_t pos, Stream stream, int64_t index) {
  return philox4x32(uint64_t(seed), uint64_t(pos), uint32_t(stream) << 28 | uint32_t(index >> 2));
}

N3_HD double uniform_of(uint32_t word) { return (word + 0.5) * 0x1p-32; }

N3_HD double gumbel_of(uint32_t word) {
  const double u = uniform_of(word);
  return -log(u > 0.5 ? -log1p(-(1 - u)) : -log(u));
}

// Word index & 3 of them; by selection, as a GPU has no registers by number.
N3_HD uint32_t word_at(int64_t seed, int64_t pos, Stream stream, int64_t index) {
  const Philox4 w = words(seed, pos, stream, index);
  const uint32_t even = index & 2 ? w.word[2] : w.word[0], odd = index & 2 ? w.word[3] : w.word[1];
  return index & 1 ? odd : even;
}

N3_HD double uniform(int64_t seed, int64_t pos, Stream stream, int64_t index) {
  return uniform_of(word_at(seed, pos, stream, index));
}

N3_HD double gumbel(int64_t seed, int64_t pos, Stream stream, int64_t index) {
  return gumbel_of(word_at(seed, pos, stream, index));
}

// 53 bits in (0, 1), from words 0 and 1 of index 0.
N3_HD double uniform53(int64_t seed, int64_t pos, Stream stream) {
  const Philox4 w = words(seed, pos, stream, 0);
  return ((w.word[0] >> 5) * 0x1p26 + (w.word[1] >> 6) + 0.5) * 0x1p-53;
}

}  // namespace n3::mtp
