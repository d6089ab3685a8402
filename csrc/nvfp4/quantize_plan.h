// How nvfp4_quantize runs on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

#include "swizzle_plan.h"

namespace n3::nvfp4_quantize {

constexpr int kThreads = 256;
constexpr int kMaxPartials = 1024;  // maxima that the first launch leaves to the second

struct Plan {
  int64_t partials;  // blocks of the first launch
  int64_t blocks;    // of the second: one thread per place of the scale matrix
  int64_t places;    // scales, padding included
};

inline Plan plan(int64_t rows, int64_t k, bool swizzled) {
  const int64_t ks = k / 16;
  const int64_t places = swizzled ? nvfp4_swizzle::padded_rows(rows) * nvfp4_swizzle::padded_cols(ks) : rows * ks;
  const int64_t wanted = (rows * ks + kThreads - 1) / kThreads;
  return {wanted < kMaxPartials ? wanted : kMaxPartials, (places + kThreads - 1) / kThreads, places};
}

}  // namespace n3::nvfp4_quantize
