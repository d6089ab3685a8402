// n3::mtp_verify_tree: from the root to accepted children, and one token more. Rules in
// n3kernels/mtp/verify_tree.py.
#include <torch/csrc/stable/library.h>

#include "../common/threads.h"
#include "drafts.h"
#include "verify_tree.h"

namespace n3::mtp {
namespace {

using namespace verify_tree;

struct Out {
  int32_t *tokens, *rows;
  float* logprobs;
  int64_t count = 0;
  int32_t flags = 0;
};

// One thread's walk through the tree of one request after another.
class Tree {
 public:
  explicit Tree(const Call& call) : rows_(call.rows), args_(call.args), row_(rows_), q_(rows_, args_) {}

  void run(const Request& request, Out& out) {
    request_ = request, out_ = &out;
    noise_ = {rows_.seed[request.slot], request.pos, request.first, args_.uniforms};
    const bool by_token = args_.mode == Mode::kToken, greedy = args_.mode == Mode::kGreedy;
    for (int64_t node = 0, depth = 0; node >= 0; ++depth) {
      find_children(node, depth);
      const int64_t child = by_token ? sibling(node, depth) : follow(node, depth, greedy);
      const int32_t token = out.tokens[out.count];
      out.rows[out.count++] = int32_t(request.first + node);
      node = is_eos(args_, token) ? -1 : child;
    }
  }

 private:
  int32_t token_of(int64_t node) const { return args_.drafts[request_.first + node]; }

  void find_children(int64_t node, int64_t depth) {
    children_.clear();
    if (depth + 1 == args_.width) return;
    for (int64_t j = node + 1; j < request_.rows; ++j) {
      if (args_.parents[request_.first + j] == node && token_of(j) >= 0) children_.push_back(j);
    }
  }

  void put(int32_t token, double logprob) {
    out_->tokens[out_->count] = token, out_->logprobs[out_->count] = float(logprob);
  }

  // The target's own token, and the first child that has it; -1: none has.
  int64_t follow(int64_t node, int64_t depth, bool greedy) {
    const Emitted e = row_.emit(request_.first + node, request_.slot, position(request_.pos, depth), greedy);
    put(e.token, e.logprob), out_->flags |= e.flags;
    int64_t child = -1;
    for (const int64_t j : children_) {
      if (token_of(j) >= rows_.vocab) out_->flags |= kOutOfRange;
      if (child < 0 && token_of(j) == e.token) child = j;
    }
    return child;
  }

  // p, with the tokens apart that some q may take away from.
  void look(int64_t node) {
    apart_.clear();
    if (args_.laws.ids && !children_.empty()) q_.read(request_.first + node, request_.slot, -1), apart_ = q_.ids();
    for (const int64_t j : children_) {
      if (token_of(j) < rows_.vocab) apart_.push_back(token_of(j));
    }
    std::sort(apart_.begin(), apart_.end());
    apart_.erase(std::unique(apart_.begin(), apart_.end()), apart_.end());
    out_->flags |= row_.law(request_.first + node, request_.slot, apart_);
    p_ = row_.apart(), factor_ = 1 / row_.total(), outside_ = row_.outside() * factor_;
    for (double& p : p_) p *= factor_;
  }

  // p becomes norm(max(p - q, 0)), if anything is left.
  void take_away() {
    double sum = outside_;
    left_.resize(p_.size());
    for (size_t a = 0; a < p_.size(); ++a) sum += left_[a] = std::max(p_[a] - q_.of(apart_[a]), 0.);
    if (!(sum > 0)) return;
    for (size_t a = 0; a < p_.size(); ++a) p_[a] = left_[a] / sum;
    outside_ /= sum, factor_ /= sum;
  }

  // The first child that is accepted; -1: none, the token is drawn from what is left.
  int64_t sibling(int64_t node, int64_t depth) {
    look(node);
    for (size_t s = 0; s < children_.size(); ++s) {
      const int64_t j = children_[s];
      const int32_t d = token_of(j);
      if (d >= rows_.vocab) {
        out_->flags |= kOutOfRange;
        continue;
      }
      if (!args_.laws.ids) q_.read(request_.first + j, request_.slot, d);
      const double q = q_.of(d), p = p_[std::lower_bound(apart_.begin(), apart_.end(), d) - apart_.begin()];
      if (!(q > 0 && q < kInf)) {
        out_->flags |= kNotDrawn;
        continue;
      }
      if (accepts(noise_.accept(j, depth, 1 + int64_t(s)), p, q)) {
        put(d, row_.logprob(d));
        return j;
      }
      take_away();
    }
    const int32_t token = row_.draw(noise_.final(node, depth), factor_, p_);
    put(token, row_.logprob(token));
    return -1;
  }

  const RowInputs& rows_;
  const TreeArgs& args_;
  Row row_;
  DraftLaw q_;

  Request request_{};
  Uniforms noise_{};
  Out* out_ = nullptr;
  std::vector<int64_t> children_;
  std::vector<int32_t> apart_;
  std::vector<double> p_, left_;           // of the tokens apart
  double factor_ = 1, outside_ = 0;        // p = factor * weight of the others, and their sum
};

void mtp_verify_tree(const Call& call) {
  const TreeArgs& a = call.args;
  const int64_t size = int64_t(a.requests) * a.width;
  std::fill_n(a.tokens, size, -1);
  std::fill_n(a.path, size, -1);
  std::fill_n(a.logprobs, size, 0.f);
  for_items(a.requests, int64_t(call.rows.rows) * call.rows.vocab, [&](auto take) {
    Tree tree(call);
    for (int64_t b = take(); b < a.requests; b = take()) {
      const Request request = request_of(call.rows, a, b);
      Out out{a.tokens + b * a.width, a.path + b * a.width, a.logprobs + b * a.width};
      if (request.live) tree.run(request, out);
      a.num_emitted[b] = int32_t(out.count);
      a.flags[b] = out.flags | (request.out_of_range ? kOutOfRange : 0);
    }
  });
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("mtp_verify_tree", TORCH_BOX(&n3::mtp::verify_tree::entry<n3::mtp::mtp_verify_tree>));
}
