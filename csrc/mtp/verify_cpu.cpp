// n3::mtp_verify: the leading drafts of each request and one token more, in six modes. Formulas in
// n3kernels/mtp/verify.py.
#include <cmath>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/threads.h"
#include "drafts.h"
#include "verify.h"

namespace n3::mtp {
namespace {

using namespace verify;

// Where a request's results go.
struct Out {
  int32_t* tokens;
  float* logprobs;
  int64_t count = 0;
  int32_t flags = 0;

  void put(int32_t token, double logprob) { tokens[count] = token, logprobs[count++] = float(logprob); }
};

// One thread's walk through the chain of one request after another.
class Chain {
 public:
  Chain(const Rows& rows, const DraftArgs& drafts, const Column<int32_t>& eos, int64_t max_drafts, const Lossy& lossy)
      : rows_(rows), drafts_(drafts), eos_(eos), max_drafts_(max_drafts), lossy_(lossy), row_(rows), q_(drafts) {}

  void run(Mode mode, const Request& request, Out& out) {
    request_ = request, out_ = &out;
    noise_ = {rows_.seed[request.slot], request.pos, request.first, drafts_.uniforms.data()};
    find_end();
    switch (mode) {
      case Mode::kGreedy: return by_target(true);
      case Mode::kCoupled: return by_target(false);
      case Mode::kToken: return by_token();
      case Mode::kBlock: return by_block();
      case Mode::kRelaxed: return by_relaxed();
      case Mode::kTypical: return by_typical();
    }
  }

 private:
  bool is_eos(int32_t token) const {
    const int32_t* ids = eos_.data();
    return std::find(ids, ids + eos_.size(), token) != ids + eos_.size();
  }

  int32_t draft(int64_t i) const { return drafts_.tokens[request_.first + i]; }

  // The chain ends at the first missing draft, and behind one that is an EOS.
  void find_end() {
    const int64_t most = std::min(request_.rows - 1, max_drafts_);
    for (k_ = 0, ends_ = false; k_ < most && !ends_ && draft(k_) >= 0; ++k_) ends_ = is_eos(draft(k_));
  }

  // Row i's law, and that of the draft it checks.
  void look(int64_t i) {
    static const std::vector<int32_t> none;
    const bool checks = i < k_;
    if (checks) q_.read(request_.first + i, request_.slot, draft(i));
    out_->flags |= row_.law(request_.first + i, request_.slot, checks && !q_.dense() ? q_.ids() : none);
  }

  void plain_law(int64_t i) {
    static const std::vector<int32_t> none;
    out_->flags |= row_.law(request_.first + i, request_.slot, none);
  }

  bool known(int64_t i) {
    if (draft(i) < rows_.vocab) return true;
    out_->flags |= kOutOfRange;
    return false;
  }

  // p and q of draft i under row i; 0 where it cannot be accepted.
  std::pair<double, double> ratio(int64_t i) {
    if (!known(i)) return {0, 0};
    const double q = q_.of(draft(i));
    if (!(q > 0 && q < kInf)) {
      out_->flags |= kNotDrawn;
      return {0, 0};
    }
    return {row_.p(draft(i)), q};
  }

  void put(int32_t token) { out_->put(token, row_.logprob(token)); }

  // What is left of w p where q is taken away, in units of the row's weights, for the tokens apart.
  void leave(double w) {
    left_ = row_.apart();
    const double share = row_.total() / w;
    for (size_t a = 0; a < left_.size(); ++a) left_[a] = std::max(left_[a] - share * q_.at(a), 0.);
  }

  // sum_x max(w p - q, 0)
  double mass_left(double w) {
    if (!(w > 0)) return 0;
    if (q_.dense()) return row_.excess(w / row_.total(), q_.all());
    leave(w);
    double sum = row_.outside();
    for (const double l : left_) sum += l;
    return sum * (w / row_.total());
  }

  // A draw from what is left, from p where nothing is.
  int32_t draw_left(double w, int64_t i) {
    const double u = noise_.final(i);
    int32_t token = -1;
    if (q_.dense()) {
      token = row_.draw_excess(u, w / row_.total(), q_.all());
    } else {
      leave(w);
      token = row_.draw(u, 1, left_);
    }
    return token >= 0 ? token : row_.draw(u, 1, row_.apart());
  }

  // The token after the last draft.
  void put_bonus() {
    if (ends_) return;
    plain_law(k_);
    put(row_.draw(noise_.final(k_), 1, row_.apart()));
  }

  void by_target(bool greedy) {
    for (int64_t i = 0; i <= k_; ++i) {
      const Emitted e = row_.emit(request_.first + i, request_.slot, request_.pos + i, greedy);
      out_->put(e.token, e.logprob), out_->flags |= e.flags;
      if (i < k_) known(i);
      if (is_eos(e.token) || i == k_ || draft(i) != e.token) return;
    }
  }

  void by_token() {
    for (int64_t i = 0; i < k_; ++i) {
      look(i);
      const auto [p, q] = ratio(i);
      if (!accepts(noise_.accept(i), p, q)) return put(draw_left(1, i));
      put(draft(i));
    }
    put_bonus();
  }

  void by_block() {
    double w = 1;
    int64_t tau = 0;
    int32_t last = -1;  // what follows tau drafts
    float last_logprob = 0;
    for (int64_t i = 0; i < k_ && w > 0; ++i) {
      look(i);
      const double above = i ? mass_left(w) : 0, all = above + 1 - w;
      const double h = i == 0 ? 1 : all > 0 ? above / all : 1;
      if (i == 0 || noise_.accept(i - 1) < h) {
        tau = i, last = draw_left(w, i), last_logprob = float(row_.logprob(last));
      }
      const auto [p, q] = ratio(i);
      w = q > 0 ? std::min(1., w * p / q) : 0;
      if (w > 0) out_->tokens[i] = draft(i), out_->logprobs[i] = float(row_.logprob(draft(i)));
    }
    if (k_ == 0 || noise_.accept(k_ - 1) < w) {
      out_->count = k_;
      return put_bonus();
    }
    out_->count = tau;
    out_->put(last, last_logprob);
    for (int64_t i = tau + 1; i < k_; ++i) out_->tokens[i] = -1, out_->logprobs[i] = 0;
  }

  void by_relaxed() {
    for (int64_t i = 0; i < k_; ++i) {
      plain_law(i);
      const int32_t d = draft(i);
      const double p = known(i) ? row_.p(d) : 0;
      if (!(p > 0 && p >= row_.largest_p() - lossy_.delta && row_.rank(d) < lossy_.top_k)) {
        return put(row_.best_token());
      }
      put(d);
    }
    if (ends_) return;
    plain_law(k_);
    put(row_.best_token());
  }

  void by_typical() {
    for (int64_t i = 0; i < k_; ++i) {
      plain_law(i);
      const int32_t d = draft(i);
      const double bar = std::min(lossy_.epsilon, lossy_.typical_delta * std::exp(-row_.entropy()));
      if (!(known(i) && row_.p(d) > bar)) return put_sample(i);
      put(d);
    }
    if (!ends_) put_sample(k_);
  }

  void put_sample(int64_t i) {
    const Emitted e = row_.emit(request_.first + i, request_.slot, request_.pos + i);
    out_->put(e.token, e.logprob), out_->flags |= e.flags;
  }

  const Rows& rows_;
  const DraftArgs& drafts_;
  const Column<int32_t>& eos_;
  int64_t max_drafts_;
  Lossy lossy_;
  Row row_;
  DraftLaw q_;
  std::vector<double> left_;

  Request request_{};
  Uniforms noise_{};
  Out* out_ = nullptr;
  int64_t k_ = 0;      // drafts in the chain
  bool ends_ = false;  // the last is an EOS
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mtp_verify(
    const Tensor& logits, const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& seed, const Tensor& pos,
    const std::string& mode_name, int64_t max_drafts, const OptionalTensor& slot, const OptionalTensor& temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p,
    const OptionalTensor& bitmask, const OptionalTensor& bitmask_row, const OptionalTensor& forced_token,
    const OptionalTensor& bias_ids, const OptionalTensor& bias_val, const OptionalTensor& bias_cu,
    const OptionalTensor& eos_ids, const OptionalTensor& draft_ids, const OptionalTensor& draft_probs,
    const OptionalTensor& draft_logits, const OptionalTensor& draft_temperature, const OptionalTensor& draft_vocab,
    bool allow_lossy, int64_t relaxed_top_k, double relaxed_delta, double typical_epsilon, double typical_delta,
    const OptionalTensor& uniforms) {
  const SlotArgs slots{seed, slot, temperature, top_k, top_p, min_p};
  const EditArgs edits{bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu};
  const LawArgs laws{draft_ids, draft_probs, draft_logits, draft_temperature, draft_vocab, uniforms};
  const Lossy lossy{allow_lossy, relaxed_top_k, relaxed_delta, typical_epsilon, typical_delta};
  const Mode mode =
      check(logits, draft_tokens, cu_rows, pos, mode_name, max_drafts, slots, edits, eos_ids, laws, lossy);
  const int64_t b = cu_rows.size(0) - 1;

  const Rows rows(logits, slots, edits);
  const DraftArgs drafts(rows.vocab, draft_tokens, laws);
  const Requests requests(rows, cu_rows, pos);
  const Column<int32_t> eos(eos_ids);
  const int64_t width = max_drafts + 1;
  const Tensor tokens = torch::stable::new_empty(logits, {b, width}, ScalarType::Int);
  const Tensor num_emitted = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const Tensor last_row = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const Tensor logprobs = torch::stable::new_empty(logits, {b, width}, ScalarType::Float);
  const Tensor flags = torch::stable::new_empty(logits, {b}, ScalarType::Int);
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  std::fill_n(ints(tokens), b * width, -1);
  std::fill_n(static_cast<float*>(logprobs.mutable_data_ptr()), b * width, 0.f);
  n3::for_items(b, rows.n * rows.vocab, [&](auto take) {
    Chain chain(rows, drafts, eos, max_drafts, lossy);
    for (int64_t i = take(); i < b; i = take()) {
      const Request request = requests[i];
      Out out{ints(tokens) + i * width, static_cast<float*>(logprobs.mutable_data_ptr()) + i * width};
      if (request.live) chain.run(mode, request, out);
      ints(num_emitted)[i] = int32_t(out.count);
      ints(last_row)[i] = out.count ? int32_t(request.first + out.count - 1) : -1;
      ints(flags)[i] = out.flags | (request.out_of_range ? kOutOfRange : 0);
    }
  });
  return {tokens, num_emitted, last_row, logprobs, flags};
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mtp_verify", TORCH_BOX(&n3::mtp::mtp_verify)); }
