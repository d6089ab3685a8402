// What verification of chains and of trees share: requests, uniform numbers, and the laws of the drafts.
#pragma once
#include <vector>

#include "row.h"

namespace n3::mtp {

constexpr double kInf = __builtin_inf();

// One request's rows; dead ones (padding) emit nothing.
struct Request {
  int64_t first, rows, slot, pos;
  bool live, out_of_range;
};

class Requests {
 public:
  Requests(const Rows& rows, const Tensor& cu_rows, const Tensor& pos) : rows_(rows), cu_(cu_rows), pos_(pos) {}

  int64_t size() const { return cu_.size() - 1; }
  Request operator[](int64_t b) const {
    const int64_t first = std::clamp<int64_t>(cu_[b], 0, rows_.n), end = std::clamp<int64_t>(cu_[b + 1], 0, rows_.n);
    const int64_t slot = rows_.slot.at(b, int32_t(b));
    return {first, end - first, slot, pos_[b], slot >= 0 && slot < rows_.slots && end > first, slot >= rows_.slots};
  }

 private:
  const Rows& rows_;
  Column<int32_t> cu_;
  Column<int64_t> pos_;
};

// The uniform numbers of a request: Philox's by position, or given by row.
struct Uniforms {
  int64_t seed, pos, first;
  const double* given;  // [N, 2] or null

  double accept(int64_t i) const { return accept(i, i, 0); }
  double final(int64_t i) const { return final(i, i); }

  // The same where row and depth are not one: of the sibling with that number, and of the node.
  double accept(int64_t row, int64_t depth, int64_t sibling) const {
    return given ? given[2 * (first + row)] : uniform(seed, pos + depth, kAccept, sibling);
  }
  double final(int64_t row, int64_t depth) const {
    return given ? given[2 * (first + row) + 1] : uniform53(seed, pos + depth, kResidual);
  }
};

inline bool accepts(double u, double p, double q) { return p > 0 && q > 0 && u * q < p; }

// The arguments of a call.
struct DraftArgs {
  DraftArgs(int64_t vocab, const Tensor& tokens, const LawArgs& laws);

  int64_t vocab;
  Column<int32_t> tokens;
  Column<int32_t> ids;
  Column<float> probs;
  int64_t width = 0;  // of ids
  OptionalTensor logits;
  int element = 0;
  int64_t stride = 0, columns = 0;  // of logits; the stride in bytes
  Column<float> temperature;
  Column<int32_t> map;
  Column<double> uniforms;
};

// One thread's view of the law q of one draft after another.
class DraftLaw {
 public:
  explicit DraftLaw(const DraftArgs& args) : args_(args) {}

  // Of the draft that is checked with row r; `token` is certain where there is no law.
  void read(int64_t r, int64_t slot, int32_t token);
  bool dense() const { return args_.logits.has_value(); }
  const std::vector<int32_t>& ids() const { return ids_; }  // ascending, inside the vocabulary; none of a dense law
  double at(size_t i) const { return q_[i]; }
  const double* all() const { return q_.data(); }  // of a dense law
  double of(int32_t token) const;

 private:
  void read_listed(int64_t r);
  void read_logits(int64_t r, int64_t slot);

  const DraftArgs& args_;
  std::vector<int32_t> ids_;
  std::vector<double> q_;
  std::vector<std::pair<int32_t, double>> listed_;
};

}  // namespace n3::mtp
