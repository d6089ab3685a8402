// Philox4x32-10, the library's source of random numbers; the Python twin is n3kernels/_philox.py. Host and device, no
// torch. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once
#include "numerics.h"

namespace n3 {

struct Philox4 {
  uint32_t word[4];
};

// The four words of one counter under one key.
N3_HD Philox4 philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t c0 = uint32_t(counter_low), c1 = uint32_t(counter_low >> 32);
  uint32_t c2 = uint32_t(counter_high), c3 = uint32_t(counter_high >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xd2511f53u) * c0, p1 = uint64_t(0xcd9e8d57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;  // golden ratio and sqrt(3) - 1: the key schedule
  }
  return {{c0, c1, c2, c3}};
}

// In [0, 1), a multiple of 2^-24: what stochastic rounding compares with.
N3_HD float uniform24(uint32_t word) { return float(word >> 8) * 5.9604644775390625e-8f; }

}  // namespace n3
