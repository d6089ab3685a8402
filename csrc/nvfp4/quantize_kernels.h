// What quantize_cpu.cpp and producers_cpu.cpp ask of each instruction set; all give the same bytes. Plain data, no
// torch: *_avx512.cpp includes it too.
#pragma once
#include <cstdint>

#include "quantize_form.h"

namespace n3::nvfp4_quantize {

// A global scale: 1 / s_enc is the decode scale; amax is what it stands for.
struct Global {
  float s_enc, inv, amax;
};

struct Encoding {
  Form form;
  const Global* globals;  // of every row if form.per_row, else one
  const float* signs;     // [16] of the rotation; null: none
  const int64_t* seed;    // [2] of stochastic rounding; null: nearest
  uint8_t *q, *scale;     // of the first row: 8 bytes and 1 byte a block, in the order of rows and k
};

// Rows [row, row + rows) of one matrix, blocks [block, block + blocks) of each.
struct Strip {
  int64_t batch, row, rows, block, blocks;
};

// Indexed by Element. Blocks are numbered in the order of rows and k over all matrices.
struct Kernels {
  // Largest finite magnitude, as float bits, of n elements side by side.
  uint32_t (*amax[3])(const void* x, int64_t n);
  // The same of rotated blocks [begin, end), of matrices whose k_stride is 1.
  uint32_t (*rotated_amax[3])(const Matrices& x, const float* signs, int64_t begin, int64_t end);
  // The same of every row of a strip, for any strides; signs may be null.
  void (*column_amax[3])(const Matrices& x, const float* signs, const Strip& strip, uint32_t* top);
  // Codes and scales of blocks [begin, end), of matrices whose k_stride is 1; x and the outputs are those of block 0.
  void (*encode[3])(const Matrices& x, const Encoding& encoding, int64_t begin, int64_t end);
  // The same with 16x16 tiles, of 16 rows.
  void (*encode_square[3])(const Matrices& x, const Encoding& encoding, const Strip& strip);
  // The same, with tiles or without, where row_stride is 1; with tiles strip.rows is a multiple of 16.
  void (*encode_columns[3])(const Matrices& x, const Encoding& encoding, const Strip& strip, bool square);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& kernels();  // those of n3::cpu_isa()

}  // namespace n3::nvfp4_quantize
