// The CPU product with NVFP4 weights as other operators use it: the kernels of this CPU, the decoding table that goes
// with a global scale, memory for both.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "linear_kernels.h"

namespace n3::nvfp4_linear {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> buffer(int64_t bytes) {
  Buffer<T> memory(static_cast<T*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

const Kernels& kernels();  // of the instruction set that cpu_isa() names

// A global scale is 2^e * factor. The power of two goes into the decoded weights, so that large activations do not
// overflow the sums before a small global scale is applied; the sums are multiplied by the factor.
struct GlobalScale {
  const void* table;  // for Kernels::sums; kept for the life of the process
  float factor;
};
GlobalScale split_global_scale(const Kernels& kernel, float global);

// Floats of a packed row of x.
inline int64_t packed_floats(int64_t k) { return (k + kChunk - 1) / kChunk * kChunk; }

}  // namespace n3::nvfp4_linear
