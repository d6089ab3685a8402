// What quantize_cpu.cpp asks of each instruction set; all give the same bytes.
#pragma once
#include <cstdint>

namespace n3::nvfp4_quantize {

enum class Source { kFloat, kHalf, kBFloat16 };

struct Encoding {
  float s_enc;
  bool four_over_six;
};

struct Kernels {
  // Largest finite |x| of `blocks` blocks of 16, as float bits.
  uint32_t (*amax)(const void* x, Source source, int64_t blocks);
  // Codes (8 bytes a block) and scales (1 byte a block) of contiguous blocks.
  void (*encode)(const void* x, Source source, int64_t blocks, Encoding encoding, uint8_t* q, uint8_t* scale);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::nvfp4_quantize
