#include "thinking_budget.h"

#include <torch/csrc/stable/library.h>

namespace {

namespace thinking = n3::thinking_budget;
using n3::Tensor;

// The rows of one request, in order.
void walk(const thinking::Args& a, int64_t b) {
  const thinking::Request request = request_of(a, b);
  const auto output = [&](int64_t i) { return output_of(a, request, b, i); };
  bool thinks = request.thinks, forces = request.spent(a.num_output[b]);
  for (int64_t k = 0; k < a.reach; ++k) forces = forces || request.starts_at(output(0), k);
  for (int64_t i = 0; i < request.last - request.first; ++i) {
    const thinking::Look look = request.look(output(i));
    forces = forces || look.starts;
    thinks = thinks && !look.ended && !(forces && look.wanted < 0);
    a.forced[request.first + i] = thinks && forces ? look.wanted : -1;
    if (a.drafts[request.first + i] < 0) break;
  }
}

Tensor thinking_budget(const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& committed_tail,
                       const Tensor& num_output, const Tensor& active, const Tensor& budget, const Tensor& grace,
                       const Tensor& end_ids, const Tensor& end_think_ids, const Tensor& newline_bitmask) {
  thinking::check(draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids, end_think_ids,
                  newline_bitmask);
  const thinking::Call call(draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids,
                            end_think_ids, newline_bitmask);
  std::fill_n(call.args.forced, call.args.rows, -1);
  for (int64_t b = 0; b < call.args.requests; ++b) walk(call.args, b);
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("thinking_budget", TORCH_BOX(&thinking_budget)); }
