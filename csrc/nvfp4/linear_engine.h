// The CPU product with NVFP4 weights as other operators use it: the kernels of this CPU, and the decoding table that
// goes with a global scale.
#pragma once
#include <cstdint>

#include "../common/buffer.h"
#include "linear_amx.h"
#include "linear_kernels.h"

namespace n3::nvfp4_linear {

const Kernels& kernels();  // of the instruction set that cpu_isa() names

// The kernels for bfloat16 activations in tiles, which have bits of their own; null where cpu_isa() is not kAmx.
const amx::Kernels* tile_kernels();

// A global scale is 2^e * factor. The power of two goes into the decoded weights, so that large activations do not
// overflow the sums before a small global scale is applied; the sums are multiplied by the factor.
struct GlobalScale {
  const void* table;  // for the kernels of `decoding`; kept for the life of the process
  float factor;
};
GlobalScale split_global_scale(const Decoding& decoding, float global);

// Floats of a packed row of x.
inline int64_t packed_floats(int64_t k) { return (k + kChunk - 1) / kChunk * kChunk; }

}  // namespace n3::nvfp4_linear
