// One thread's view of one row of logits after another: edits, filters, weights and draws, for all operators of the
// family. A row is read tile by tile, and nothing of it is kept but its sub-tiles' maxima, its tiles' masses and, under
// a filter, the tokens that stay. Formulas in n3kernels/mtp/reference.py.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "../common/cpu.h"
#include "inputs.h"
#include "random.h"
#include "row_kernels.h"

namespace n3::mtp {

template <typename T>
T value_or(const T* p, int64_t i, T otherwise) {
  return p ? p[i] : otherwise;
}

// Element i of logits of a type of RowInputs.
inline float logit_at(const void* data, int32_t type, int64_t i) {
  if (type == 0) return static_cast<const float*>(data)[i];
  return type == 1 ? to_float(static_cast<const Half*>(data)[i]) : to_float(static_cast<const BFloat16*>(data)[i]);
}

inline bool is_greedy(float temperature) { return !(temperature >= 1e-5f); }

constexpr float kMost = FLT_MAX;

struct Emitted {
  int32_t token;
  float logprob;
  int32_t flags;
};

class Row {
 public:
  explicit Row(const RowInputs& rows);

  // Token, log-probability and flags of row r, as the operator `sample` emits them.
  Emitted emit(int64_t r, int64_t slot, int64_t pos, bool greedy = false);

  // Prepares the law of row r for the calls below. `apart`: ascending ids inside the vocabulary whose weights are kept
  // out of the tiles' masses. Returns the row's flags.
  int32_t law(int64_t r, int64_t slot, const std::vector<int32_t>& apart);

  double total() const { return total_; }            // of all weights; p = weight / total
  double outside() const { return outside_; }        // of all but those set apart
  const std::vector<double>& apart() const { return apart_weight_; }
  double p(int32_t token);
  double logprob(int32_t token);
  int32_t best_token();                              // the largest, of equals the lowest
  double largest_p() const { return 1 / total_; }
  int64_t rank(int32_t token);                       // how many come before it: larger ones, and equals below it
  double entropy();

  // The token at which the running sum of weights passes u times their total: factor * weight, but for the tokens set
  // apart, whose weights are `own`. -1 if nothing weighs.
  int32_t draw(double u, double factor, const std::vector<double>& own);

  // sum_x max(factor * weight(x) - q[x], 0), and the draw from it, of a law with nothing set apart.
  double excess(double factor, const double* q);
  int32_t draw_excess(double u, double factor, const double* q);

  // The m most probable tokens of row r as it lies in memory: descending, of equals ascending. For drafters.
  void most_probable(int64_t r, int64_t m, std::vector<std::pair<float, int32_t>>& found);

 private:
  struct Edit {
    int32_t id;
    float value;
  };

  void open(int64_t r);
  void read_edits(int64_t r);
  void scan();
  const float* load(int64_t begin, int64_t n);
  const float* load_copy(int64_t begin, int64_t n);
  float value(int32_t token);
  float weight_of(float x);
  double z(float x) const { return std::min(double(x) - scale_.best, 0.) / temperature_; }
  bool fixed(int64_t r, int64_t slot, bool greedy);
  void cut(int64_t slot);
  void cut_top_k(int64_t k);
  float guess_bound(int64_t k);
  void cut_top_p(float top_p);
  void cut_candidates(float least);
  void collect(float bound);
  float select(double share);
  void weigh();
  void weigh_candidates();
  void weigh_dense();
  int32_t coupled(int64_t seed, int64_t pos);
  int32_t lowest_allowed() const;
  static int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
  int64_t subs() const { return (rows_.vocab + kSub - 1) / kSub; }
  int64_t tiles() const { return (rows_.vocab + kTile - 1) / kTile; }
  int64_t tile_size(int64_t tile) const { return std::min(kTile, rows_.vocab - tile * kTile); }
  bool empty_tile(int64_t tile) const;
  std::pair<int64_t, int64_t> candidates_of(int64_t tile) const;
  template <typename F>
  void over_tile(int64_t tile, F f);

  const RowInputs& rows_;
  const Kernels& kernels_;

  // the row at hand
  int64_t row_ = 0;
  const char* data_ = nullptr;
  const int32_t* mask_ = nullptr;
  std::vector<Edit> edits_;  // by id, of one id in the order given
  int32_t flags_ = 0;
  float best_ = 0;
  std::vector<float> maxima_;

  // its law
  int32_t fixed_ = -1;  // the only token, -1: there are several
  double temperature_ = 1;
  Scale scale_{};
  bool sparse_ = false;  // what stays is among the candidates
  int64_t count_ = 0;    // candidates: values_, ids_ and weights_
  double total_ = 0, outside_ = 0;
  std::vector<int32_t> apart_;
  std::vector<double> apart_weight_, tiles_, ends_;

  Buffer<float> tile_, tile_weight_, values_, weights_;
  Buffer<int32_t> ids_, rivals_;
  std::vector<std::pair<float, float>> chosen_;  // of select()
  std::vector<float> order_, order_weight_, next_, next_weight_;
};

// Calls f(token, logit, weight) for every token of a tile that weighs and is not set apart.
template <typename F>
void Row::over_tile(int64_t tile, F f) {
  if (sparse_) {
    const auto [first, last] = candidates_of(tile);
    for (int64_t i = first; i < last; ++i) {
      if (weights_[i] > 0) f(ids_[i], values_[i], weights_[i]);
    }
    return;
  }
  if (empty_tile(tile)) return;
  const int64_t begin = tile * kTile, n = tile_size(tile);
  const float* x = load(begin, n);
  float* w = tile_weight_.get();
  kernels_.weights(scale_, x, padded(n), w);
  for (auto a = std::lower_bound(apart_.begin(), apart_.end(), begin); a != apart_.end() && *a < begin + n; ++a) {
    w[*a - begin] = 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (w[i] > 0) f(int32_t(begin + i), x[i], w[i]);
  }
}

}  // namespace n3::mtp
