// The products of bfloat16 rows with dense bfloat16 weights in AMX tiles: every number of tokens goes through them, so
// that a row's bits do not depend on it. Weights are read where they lie; common/amx.h has the summation contract, in
// which elements of k come in their order.
#pragma once
#include "../common/amx.h"
#include "dense_kernels.h"

namespace n3::dense_linear::amx {

using namespace n3::amx;

// How elements of k are ordered in the pairs of a step: as they come, or as the kernel for NVFP4 decodes them.
enum class Pairs { kInOrder, kNvfp4 };

// What becomes of a panel's accumulators, [tile of tokens][row][token]: multiplied with a factor, activated and packed
// in two parts as step `step` of tiles for the next product.
struct Packing {
  Activation activation;
  const char *h, *value;  // accumulators; value: of the second half, or null
  float factor;
  int64_t rows, tokens, step, k;  // k: of the tiles
  Pairs pairs;
  char* tiles;
};

struct Kernels {
  Pack pack;
  // The accumulators, acc_bytes(x.tokens) for every kPanelRows rows.
  void (*accumulate)(const Panel& panel, const Packed& x, char* acc);
  void (*pack_activated)(const Packing& packing);
  // to[token][row] = acc * factor.
  void (*to_rows)(const char* acc, float factor, int64_t rows, int64_t tokens, float* const* to);
};

extern const Kernels kKernels;

}  // namespace n3::dense_linear::amx

namespace n3::dense_linear {

const amx::Kernels* tile_kernels();  // null where cpu_isa() is not kAmx

}  // namespace n3::dense_linear
