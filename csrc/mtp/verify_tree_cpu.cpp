// n3::mtp_verify_tree: from the root to accepted children, and one token more. Rules in
// n3kernels/mtp/verify_tree.py.
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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
  Tree(const Rows& rows, const DraftArgs& drafts, const Column<int32_t>& parents, const Column<int32_t>& eos,
       int64_t max_depth)
      : rows_(rows), drafts_(drafts), parents_(parents), eos_(eos), max_depth_(max_depth), row_(rows), q_(drafts) {}

  void run(Mode mode, const Request& request, Out& out) {
    request_ = request, out_ = &out;
    noise_ = {rows_.seed[request.slot], request.pos, request.first, drafts_.uniforms.data()};
    for (int64_t node = 0, depth = 0; node >= 0; ++depth) {
      find_children(node, depth);
      const int64_t child = mode == Mode::kToken ? sibling(node, depth) : follow(node, depth, mode == Mode::kGreedy);
      const int32_t token = out.tokens[out.count];
      out.rows[out.count++] = int32_t(request.first + node);
      const int32_t* ids = eos_.data();
      node = std::find(ids, ids + eos_.size(), token) != ids + eos_.size() ? -1 : child;
    }
  }

 private:
  int32_t token_of(int64_t node) const { return drafts_.tokens[request_.first + node]; }

  void find_children(int64_t node, int64_t depth) {
    children_.clear();
    if (depth == max_depth_) return;
    for (int64_t j = node + 1; j < request_.rows; ++j) {
      if (parents_[request_.first + j] == node && token_of(j) >= 0) children_.push_back(j);
    }
  }

  void put(int32_t token, double logprob) {
    out_->tokens[out_->count] = token, out_->logprobs[out_->count] = float(logprob);
  }

  // The target's own token, and the first child that has it; -1: none has.
  int64_t follow(int64_t node, int64_t depth, bool greedy) {
    const Emitted e = row_.emit(request_.first + node, request_.slot, request_.pos + depth, greedy);
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
    if (drafts_.ids && !children_.empty()) q_.read(request_.first + node, request_.slot, -1), apart_ = q_.ids();
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
      if (!drafts_.ids) q_.read(request_.first + j, request_.slot, d);
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

  const Rows& rows_;
  const DraftArgs& drafts_;
  const Column<int32_t>&parents_, &eos_;
  int64_t max_depth_;
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mtp_verify_tree(
    const Tensor& logits, const Tensor& node_tokens, const Tensor& parents, const Tensor& cu_rows, const Tensor& seed,
    const Tensor& pos, const std::string& mode_name, int64_t max_depth, const OptionalTensor& slot,
    const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
    const OptionalTensor& min_p, const OptionalTensor& bitmask, const OptionalTensor& bitmask_row,
    const OptionalTensor& forced_token, const OptionalTensor& bias_ids, const OptionalTensor& bias_val,
    const OptionalTensor& bias_cu, const OptionalTensor& eos_ids, const OptionalTensor& draft_ids,
    const OptionalTensor& draft_probs, const OptionalTensor& draft_vocab, const OptionalTensor& uniforms) {
  const SlotArgs slots{seed, slot, temperature, top_k, top_p, min_p};
  const EditArgs edits{bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu};
  const OptionalTensor none;
  const LawArgs laws{draft_ids, draft_probs, none, none, draft_vocab, uniforms};
  const Mode mode =
      check(logits, node_tokens, parents, cu_rows, pos, mode_name, max_depth, slots, edits, eos_ids, laws);
  const int64_t b = cu_rows.size(0) - 1;

  const Rows rows(logits, slots, edits);
  const DraftArgs drafts(rows.vocab, node_tokens, laws);
  const Requests requests(rows, cu_rows, pos);
  const Column<int32_t> parent(parents), eos(eos_ids);
  const int64_t width = max_depth + 1;
  const Tensor tokens = torch::stable::new_empty(logits, {b, width}, ScalarType::Int);
  const Tensor num_emitted = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const Tensor path = torch::stable::new_empty(logits, {b, width}, ScalarType::Int);
  const Tensor logprobs = torch::stable::new_empty(logits, {b, width}, ScalarType::Float);
  const Tensor flags = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  auto* logprob = static_cast<float*>(logprobs.mutable_data_ptr());
  std::fill_n(ints(tokens), b * width, -1);
  std::fill_n(ints(path), b * width, -1);
  std::fill_n(logprob, b * width, 0.f);
  for_items(b, rows.n * rows.vocab, [&](auto take) {
    Tree tree(rows, drafts, parent, eos, max_depth);
    for (int64_t i = take(); i < b; i = take()) {
      const Request request = requests[i];
      Out out{ints(tokens) + i * width, ints(path) + i * width, logprob + i * width};
      if (request.live) tree.run(mode, request, out);
      ints(num_emitted)[i] = int32_t(out.count);
      ints(flags)[i] = out.flags | (request.out_of_range ? kOutOfRange : 0);
    }
  });
  return {tokens, num_emitted, path, logprobs, flags};
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mtp_verify_tree", TORCH_BOX(&n3::mtp::mtp_verify_tree)); }
