// n3::mtp_verify: the leading drafts of each request and one token more, in six modes. Formulas in
// n3kernels/mtp/verify.py.
#include <cmath>

#include <torch/csrc/stable/library.h>

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
  explicit Chain(const Call& call)
      : rows_(call.rows), args_(call.args), row_(rows_), q_(rows_, args_, call.drafter) {}

  void run(const Request& request, Out& out) {
    request_ = request, out_ = &out;
    noise_ = {rows_.seed[request.slot], request.pos, request.first, args_.uniforms};
    find_end();
    switch (args_.mode) {
      case Mode::kGreedy: return by_target(true);
      case Mode::kCoupled: return by_target(false);
      case Mode::kToken: return by_token();
      case Mode::kBlock: return by_block();
      case Mode::kRelaxed: return by_relaxed();
      case Mode::kTypical: return by_typical();
    }
  }

 private:
  int32_t draft(int64_t i) const { return args_.drafts[request_.first + i]; }

  // The chain ends at the first missing draft, and behind one that is an EOS.
  void find_end() {
    const int64_t most = std::min<int64_t>(request_.rows, args_.width) - 1;
    for (k_ = 0, ends_ = false; k_ < most && !ends_ && draft(k_) >= 0; ++k_) ends_ = is_eos(args_, draft(k_));
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
      const Emitted e = row_.emit(request_.first + i, request_.slot, position(request_.pos, i), greedy);
      out_->put(e.token, e.logprob), out_->flags |= e.flags;
      if (i < k_) known(i);
      if (is_eos(args_, e.token) || i == k_ || draft(i) != e.token) return;
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
      if (!(p > 0 && p >= row_.largest_p() - args_.relaxed_delta && row_.rank(d) < args_.relaxed_top_k)) {
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
      const double bar = std::min(args_.typical_epsilon, args_.typical_delta * std::exp(-row_.entropy()));
      if (!(known(i) && row_.p(d) > bar)) return put_sample(i);
      put(d);
    }
    if (!ends_) put_sample(k_);
  }

  void put_sample(int64_t i) {
    const Emitted e = row_.emit(request_.first + i, request_.slot, position(request_.pos, i));
    out_->put(e.token, e.logprob), out_->flags |= e.flags;
  }

  const RowInputs& rows_;
  const VerifyArgs& args_;
  Row row_;
  DraftLaw q_;
  std::vector<double> left_;

  Request request_{};
  Uniforms noise_{};
  Out* out_ = nullptr;
  int64_t k_ = 0;      // drafts in the chain
  bool ends_ = false;  // the last is an EOS
};

void mtp_verify(const Call& call) {
  const VerifyArgs& a = call.args;
  std::fill_n(a.tokens, int64_t(a.requests) * a.width, -1);
  std::fill_n(a.logprobs, int64_t(a.requests) * a.width, 0.f);
  for_items(a.requests, int64_t(call.rows.rows) * call.rows.vocab, [&](auto take) {
    Chain chain(call);
    for (int64_t b = take(); b < a.requests; b = take()) {
      const Request request = request_of(call.rows, a, b);
      Out out{a.tokens + b * a.width, a.logprobs + b * a.width};
      if (request.live) chain.run(request, out);
      a.num_emitted[b] = int32_t(out.count);
      a.last_row[b] = out.count ? int32_t(request.first + out.count - 1) : -1;
      a.flags[b] = out.flags | (request.out_of_range ? kOutOfRange : 0);
    }
  });
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mtp_verify", TORCH_BOX(&n3::mtp::verify::entry<n3::mtp::mtp_verify>)); }
