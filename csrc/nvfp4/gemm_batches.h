// What the CPU products of NVFP4 matrices share: the rows that are packed at a time, and the end of the operators.
#pragma once
#include <algorithm>
#include <vector>

#include "../common/element.h"
#include "gemm_engine.h"

namespace n3::nvfp4_gemm {

// Segments, or parts of them, whose rows are packed together.
struct Batch {
  struct Piece {
    Segment rows;
    int64_t packed;  // rows before it
  };
  std::vector<Piece> pieces;
  int64_t tokens = 0;
};

inline std::vector<Batch> batches(const std::vector<Segment>& segments, int64_t most) {
  std::vector<Batch> all(1);
  for (const Segment& s : segments) {
    for (int64_t done = 0; done < s.tokens;) {
      if (all.back().tokens == most) all.emplace_back();
      Batch& batch = all.back();
      const int64_t tokens = std::min(s.tokens - done, most - batch.tokens);
      batch.pieces.push_back({{s.first + done, tokens, s.expert}, batch.tokens});
      batch.tokens += tokens;
      done += tokens;
    }
  }
  return all;
}

// y of the rows n0 ... n0 + rows of one matrix of b, from their sums.
template <typename T>
void finish(const Params& p, const Segment& s, int64_t n0, int64_t rows, int64_t stride, const float* sums) {
  const T* bias = static_cast<const T*>(p.bias);
  const float* b_global = p.b.global + (p.b.global_per_row ? n0 : s.expert);
  for (int64_t t = 0; t < s.tokens; ++t) {
    const int64_t row = s.first + t;
    const float a_global = p.a.global[p.a.global_per_row ? row : 0];
    T* y = static_cast<T*>(p.y) + row * p.n + n0;
    for (int64_t r = 0; r < rows; ++r) {
      float v = sums[t * stride + r] * a_global * b_global[p.b.global_per_row ? r : 0];
      if (bias) v += to_float(bias[n0 + r]);
      y[r] = from_float<T>(v);
    }
  }
}

}  // namespace n3::nvfp4_gemm
