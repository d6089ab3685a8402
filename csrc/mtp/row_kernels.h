// What the rows (row.h) ask of each instruction set; all give the same bits. Rows of floats are padded with -inf to whole
// blocks; a NaN among them is passed over by all but `maxima` and `largest`, which report it.
#pragma once
#include "plan.h"

namespace n3::mtp {

constexpr int64_t kBlock = 16;  // floats
constexpr float kInfinity = __builtin_inff();

// The weight of a logit x: e^((x - best) / temperature), 0 below the cut-off. 1 / temperature in two parts.
struct Scale {
  float best, high, low, cut;
};

// A position's noise for the tokens of one tile.
struct Noise {
  int64_t seed, pos;
};

struct Kernels {
  // By Element. The largest of each of `subs` sub-tiles of a row as it lies in memory; whether a NaN was seen.
  bool (*maxima[3])(const void* row, int64_t subs, float* maxima);
  // n logits as floats, and -inf up to a whole block.
  void (*widen[3])(const void* row, int64_t n, float* x);
  float (*largest)(const float* x, int64_t n, bool& nan);
  // The first x that is `value`, n if there is none.
  int64_t (*find)(const float* x, int64_t n, float value);
  // -inf where a bit is 0; bit j of word i belongs to x[32 i + j].
  void (*mask)(float* x, const int32_t* words, int64_t count);
  // Appends every x >= bound and its index + base, in order; their number.
  int64_t (*collect)(const float* x, int64_t n, int32_t base, float bound, float* values, int32_t* ids);
  // The sum of the weights, in kBlock interleaved sums of doubles.
  double (*mass)(const Scale&, const float* x, int64_t n);
  void (*weights)(const Scale&, const float* x, int64_t n, float* w);
  // The indices, ascending, at which a weight may beat `limit`: w * limit >= 1 - u, u the token's uniform number.
  int64_t (*rivals)(const Noise&, int64_t first_token, const float* w, int64_t n, float limit, int32_t* found);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& kernels();  // of this processor

}  // namespace n3::mtp
