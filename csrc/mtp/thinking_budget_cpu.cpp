#include "thinking_budget.h"

#include <torch/csrc/stable/library.h>

namespace n3::thinking_budget {
namespace {

// The rows of one request, in order.
void walk(const Args& a, int64_t b) {
  const Request request = request_of(a, b);
  const auto output = [&](int64_t i) { return output_of(a, request, b, i); };
  bool thinks = request.thinks, forces = request.spent(a.num_output[b]);
  for (int64_t k = 0; k < a.reach; ++k) forces = forces || request.starts_at(output(0), k);
  for (int64_t i = 0; i < request.last - request.first; ++i) {
    const Look look = request.look(output(i));
    forces = forces || look.starts;
    thinks = thinks && !look.ended && !(forces && look.wanted < 0);
    a.forced[request.first + i] = thinks && forces ? look.wanted : -1;
    if (a.drafts[request.first + i] < 0) break;
  }
}

void thinking_budget(const Call& call) {
  std::fill_n(call.args.forced, call.args.rows, -1);
  for (int64_t b = 0; b < call.args.requests; ++b) walk(call.args, b);
}

}  // namespace
}  // namespace n3::thinking_budget

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("thinking_budget", TORCH_BOX(&n3::thinking_budget::entry<n3::thinking_budget::thinking_budget>));
}
