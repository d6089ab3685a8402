// What verification of chains and of trees share: requests, uniform numbers, and the laws of the drafts.
#pragma once
#include <utility>
#include <vector>

#include "row.h"

namespace n3::mtp {

// Positions go around, as the counters that they become do.
inline int64_t position(int64_t pos, int64_t ahead) { return int64_t(uint64_t(pos) + uint64_t(ahead)); }

constexpr double kInf = __builtin_inf();

// One request's rows; dead ones (padding) emit nothing.
struct Request {
  int64_t first, rows, slot, pos;
  bool live, out_of_range;
};

Request request_of(const RowInputs& rows, const WalkArgs& args, int64_t b);

inline bool is_eos(const WalkArgs& args, int32_t token) {
  return std::find(args.eos, args.eos + args.eos_count, token) != args.eos + args.eos_count;
}

// The uniform numbers of a request: Philox's by position, or given by row.
struct Uniforms {
  int64_t seed, pos, first;
  const double* given;  // [N, 2] or null

  double accept(int64_t i) const { return accept(i, i, 0); }
  double final(int64_t i) const { return final(i, i); }

  // The same where row and depth are not one: of the sibling with that number, and of the node.
  double accept(int64_t row, int64_t depth, int64_t sibling) const {
    return given ? given[2 * (first + row)] : uniform(seed, position(pos, depth), kAccept, sibling);
  }
  double final(int64_t row, int64_t depth) const {
    return given ? given[2 * (first + row) + 1] : uniform53(seed, position(pos, depth), kResidual);
  }
};

inline bool accepts(double u, double p, double q) { return p > 0 && q > 0 && u * q < p; }

// One thread's view of the law q of one draft after another.
class DraftLaw {
 public:
  // `drafter`: the rows of its logits, where it has some.
  DraftLaw(const RowInputs& rows, const WalkArgs& args, const RowInputs& drafter = {})
      : vocab_(rows.vocab), laws_(args.laws), drafter_(drafter) {}

  // Of the draft that is checked with row r; `token` is certain where there is no law.
  void read(int64_t r, int64_t slot, int32_t token);
  bool dense() const { return drafter_.logits != nullptr; }
  const std::vector<int32_t>& ids() const { return ids_; }  // ascending, inside the vocabulary; none of a dense law
  double at(size_t i) const { return q_[i]; }
  const double* all() const { return q_.data(); }  // of a dense law
  double of(int32_t token) const;

 private:
  void read_listed(int64_t r);
  void read_logits(int64_t r, int64_t slot);

  int32_t target_of(int64_t id) const;

  const int32_t vocab_;
  const LawInputs laws_;
  const RowInputs drafter_;
  std::vector<int32_t> ids_;
  std::vector<double> q_;
  std::vector<std::pair<int32_t, double>> listed_;
};

}  // namespace n3::mtp
