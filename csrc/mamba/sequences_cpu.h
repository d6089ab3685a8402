// Sequences and scratch memory, for the scan on the CPU and its gradients.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "ssd_scan_kernels.h"

namespace n3::ssd_scan {

// What the values of the indices say, checked before anything is written.
struct Sequence {
  int64_t number, first, length, slot;
  bool has_initial;
  std::vector<Checkpoint> checkpoints;
};

inline std::vector<Sequence> sequences_of(const Params& p) {
  mamba::check_prefill_values(op, "x", p);
  std::vector<Sequence> found(p.sequences);
  for (int64_t s = 0; s < p.sequences; ++s) {
    const int64_t first = p.cu_seqlens.data ? p.cu_seqlens(s) : 0;
    const int64_t length = p.cu_seqlens.data ? p.cu_seqlens(s + 1) - first : p.length;
    const bool* has_initial = static_cast<const bool*>(p.has_initial.data);
    found[s] = {s, first, length, p.state_indices(s), !has_initial || has_initial[s * p.has_initial.strides[0]], {}};
  }
  return found;
}

// Aligned memory of a thread, kept from call to call. Zeros at first: what a tile reads beyond its matrix must not be
// slow (subnormal) by chance.
inline float* scratch_of_thread(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
    size = memory ? floats : 0;
    if (!memory) throw std::bad_alloc();
    std::fill_n(memory.get(), floats, 0.f);
  }
  return memory.get();
}

}  // namespace n3::ssd_scan
