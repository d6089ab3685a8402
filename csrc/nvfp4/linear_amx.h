// The product of bfloat16 activations with NVFP4 weights in AMX tiles: every number of tokens goes through them, so
// that a row's bits do not depend on it. Plain data, no torch: linear_amx.cpp includes it too.
//
// The summation contract is that of common/amx.h, with a step of two blocks of k, whose elements come in this order: of
// each block the even chain takes elements 0, 8, 1, 9, 2, 10, 3, 11 and the odd chain 4, 12, 5, 13, 6, 14, 7, 15, first
// of the even block of the step, then of the odd one.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common/amx.h"
#include "linear_kernels.h"

namespace n3::nvfp4_linear::amx {

using namespace n3::amx;

// Tokens in each of several calls of nearly equal size: so many that their packed x and a decoded panel stay in a
// level-2 cache of 2 MiB.
inline int64_t tokens_per_call(int64_t tokens, int64_t k) {
  const int64_t most = std::clamp<int64_t>((1 << 19) / k / kPairTokens * kPairTokens, kPairTokens, 256);
  const int64_t calls = (tokens + most - 1) / most, each = (tokens + calls - 1) / calls;
  return calls == 1 ? tokens : (each + kPairTokens - 1) / kPairTokens * kPairTokens;
}

// Where the sums of a panel go: y[token * stride + row] = act(sum * global + bias[row]), bfloat16, rounded once.
struct Outputs {
  float global;
  const void* bias;  // bfloat16, of the panel's rows, or null
  bool relu2;
  void* y;
  int64_t stride;
};

// Of panels of at most kPanelRows rows.
struct Kernels {
  Decoding decoding;
  int64_t (*scratch_bytes)(int64_t k, int64_t tokens);
  Pack pack;
  // The accumulators, acc_bytes(x.tokens): [tile of tokens][row][token].
  void (*accumulate)(const void* table, const Panel& panel, const Packed& x, void* scratch, char* acc);
  // out[token * kPanelRows + row]: the sums, of x in one part.
  void (*sums)(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch, float* out);
  void (*product)(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch,
                  const Outputs& out);
};

extern const Kernels kKernels;

}  // namespace n3::nvfp4_linear::amx
