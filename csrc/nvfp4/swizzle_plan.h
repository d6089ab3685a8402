// How the scale layouts are changed on a GPU, and the padding they share: pure host arithmetic.
#pragma once
#include <cstdint>

#include "../common/numerics.h"

namespace n3::nvfp4_swizzle {

constexpr int kThreads = 256;

N3_HD int64_t padded_rows(int64_t rows) { return (rows + 127) / 128 * 128; }
N3_HD int64_t padded_cols(int64_t cols) { return (cols + 3) / 4 * 4; }

// One thread moves 4 neighbouring scales of a row, which stay neighbours in both layouts.
inline int64_t words(int64_t batch, int64_t rows, int64_t cols, bool with_padding) {
  return batch * (with_padding ? padded_rows(rows) : rows) * (padded_cols(cols) / 4);
}

inline int64_t blocks(int64_t words) { return (words + kThreads - 1) / kThreads; }

}  // namespace n3::nvfp4_swizzle
