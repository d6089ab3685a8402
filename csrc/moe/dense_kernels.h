// What the products with dense weights ask of each instruction set, and the summation contract all of them keep.
//
// One output is kChains chains of fused multiply-adds: chain j takes elements j, j + 8, j + 16 .. of k, ascending, and
// the sum is ((0 + 2) + (1 + 3)) + ((4 + 6) + (5 + 7)). Weights lie along k in memory, and so do the lanes: nothing is
// transposed. The contract does not mention the number of tokens, rows or threads, nor the vector length, so none of
// them shows in the bits.
#pragma once
#include <cstdint>

#include "../common/element.h"

namespace n3::dense_linear {

constexpr int64_t kChains = 8;
constexpr int64_t kRowTile = 8;  // outputs of a token come in whole tiles of rows

constexpr int64_t whole(int64_t n, int64_t part) { return (n + part - 1) / part * part; }

// Weight rows w [rows, k], one behind the other, times rows of x: floats, zeros from k to whole(k, kChains).
struct Panel {
  const void* w;
  int64_t rows, k;
};

enum Activation { kNone, kRelu2, kSilu, kGelu };

struct Kernels {  // tables of three are indexed by Element
  int64_t (*scratch_floats)(int64_t k, int64_t tokens);
  // out[t * whole(rows, kRowTile) + r] = w[r] . x[t]; behind the last row of a token, anything.
  void (*sums[3])(const Panel& panel, const float* const* x, int64_t tokens, float* scratch, float* out);
  // to[i] = act(h[i]), times value[i] for silu and gelu. `to` may be h.
  void (*activate)(Activation activation, const float* h, const float* value, int64_t n, float* to);
  // to[i] = from[i], n elements, and zeros to whole(n, kChains).
  void (*widen[3])(const void* from, int64_t n, float* to);
  void (*narrow[3])(const float* from, int64_t n, void* to);
  // sum[i] += weight * row[i].
  void (*add)(float weight, const float* row, int64_t n, float* sum);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& kernels();  // those of n3::cpu_isa()

}  // namespace n3::dense_linear
