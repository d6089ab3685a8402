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

// The panel of rows n0 ... n0 + rows of one matrix of b, and its sums.
struct Panel {
  const Segment& tokens;
  int64_t n0, rows, stride;  // sums[token * stride + row]
  float* sums;
};

// The value of row r of the panel for the token t, from its sum.
class Scaled {
 public:
  Scaled(const Params& p, const Panel& panel)
      : a_global_(p.a.global + (p.a.global_per_row ? panel.tokens.first : 0)),
        b_global_(p.b.global + (p.b.global_per_row ? panel.n0 : panel.tokens.expert)),
        a_step_(p.a.global_per_row),
        b_step_(p.b.global_per_row) {}
  float operator()(float sum, int64_t t, int64_t r) const {
    return sum * a_global_[t * a_step_] * b_global_[r * b_step_];
  }

 private:
  const float *a_global_, *b_global_;
  bool a_step_, b_step_;
};

// y of a panel, rounded to T.
template <typename T>
void finish(const Params& p, const Panel& panel) {
  const T* bias = static_cast<const T*>(p.bias);
  const Scaled scaled(p, panel);
  for (int64_t t = 0; t < panel.tokens.tokens; ++t) {
    T* y = static_cast<T*>(p.y) + (panel.tokens.first + t) * p.n + panel.n0;
    for (int64_t r = 0; r < panel.rows; ++r) {
      float v = scaled(panel.sums[t * panel.stride + r], t, r);
      if (bias) v += to_float(bias[panel.n0 + r]);
      y[r] = from_float<T>(v);
    }
  }
}

// Codes and scales of a panel, which has whole blocks; overwrites the sums.
void finish_codes(const Params& p, const Panel& panel);

// How the panels of a call end.
using Finish = void (*)(const Params&, const Panel&);

inline Finish finish_of(const Params& p) {
  if (p.codes) return finish_codes;
  switch (p.out_dtype) {  // check() let nothing else through
    case ScalarType::Float: return finish<float>;
    case ScalarType::Half: return finish<Half>;
    default: return finish<BFloat16>;
  }
}

}  // namespace n3::nvfp4_gemm
