#include "thinking_budget.h"

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "row.h"

namespace {

namespace thinking = n3::thinking_budget;
using n3::ScalarType;
using n3::Tensor;
using n3::mtp::Column;

// Strings padded with -1 on the right.
struct Strings {
  explicit Strings(const Tensor& t) : ids(t), width(t.size(t.dim() - 1)), count(t.dim() == 2 ? t.size(0) : 1) {}

  const int32_t* at(int64_t i) const { return ids.data() + i * width; }
  int64_t length(int64_t i) const {
    return std::find_if(at(i), at(i) + width, [](int32_t id) { return id < 0; }) - at(i);
  }

  Column<int32_t> ids;
  int64_t width, count;
};

// One request's output: its committed tail and the drafts behind it, and how many tokens it has in all.
struct Output {
  std::vector<int32_t> tokens;
  int64_t n;

  // It ends with these, all of them its own.
  bool ends_with(const int32_t* string, int64_t length) const {
    if (length > n || length > int64_t(tokens.size())) return false;
    return std::equal(string, string + length, tokens.end() - length);
  }
};

struct Rules {
  int64_t budget, grace;
  const int32_t* end;
  int64_t end_length, end_width;
  const Strings& end_think;
  const Column<int32_t>& newlines;

  bool newline(int32_t id) const {
    return id >= 0 && id < 32 * newlines.size() && (newlines[id >> 5] >> (id & 31) & 1);
  }
  bool spent(int64_t n) const { return budget >= 0 && n >= budget + grace; }

  // Forcing began at or before the present length.
  bool begun(const Output& output) const {
    if (budget < 0) return false;
    const int64_t tail = int64_t(output.tokens.size());
    for (int64_t i = 0; i < tail; ++i) {
      const int64_t length = output.n - (tail - 1 - i);  // when this token was the last
      if (length >= 1 && length >= budget && newline(output.tokens[i])) return true;
    }
    return spent(output.n);
  }

  bool done_thinking(const Output& output) const {
    for (int64_t s = 0; s < end_think.count; ++s) {
      const int64_t length = end_think.length(s);
      if (length > 0 && output.ends_with(end_think.at(s), length)) return true;
    }
    return false;
  }

  // The token to force next, -1 where the string is complete.
  int32_t wanted(const Output& output) const {
    int64_t done = end_length;
    while (done > 0 && !output.ends_with(end, done)) --done;
    return done < end_width ? end[done] : -1;
  }

  // After one more token.
  int32_t step(const Output& output, bool& thinks, bool& forces) const {
    thinks = thinks && !done_thinking(output);
    forces = forces || spent(output.n) ||
             (budget >= 0 && output.n >= 1 && output.n >= budget && newline(output.tokens.back()));
    const int32_t token = wanted(output);
    if (forces && token < 0) thinks = false;
    return thinks && forces ? token : -1;
  }
};

Tensor thinking_budget(const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& committed_tail,
                       const Tensor& num_output, const Tensor& active, const Tensor& budget, const Tensor& grace,
                       const Tensor& end_ids, const Tensor& end_think_ids, const Tensor& newline_bitmask) {
  const int64_t requests = thinking::check(draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace,
                                           end_ids, end_think_ids, newline_bitmask);
  const int64_t n = draft_tokens.size(0);
  const Tensor out = torch::stable::new_empty(draft_tokens, {n}, ScalarType::Int);
  auto* forced = static_cast<int32_t*>(out.mutable_data_ptr());
  std::fill_n(forced, n, -1);
  const Column<int32_t> drafts(draft_tokens), cu(cu_rows), tail(committed_tail), length(num_output), on(active),
      limit(budget), wait(grace), newlines(newline_bitmask);
  const Strings ends(end_ids), end_think(end_think_ids);
  const int64_t width = committed_tail.size(1);
  for (int64_t b = 0; b < requests; ++b) {
    const int64_t first = std::clamp<int64_t>(cu[b], 0, n), last = std::clamp<int64_t>(cu[b + 1], 0, n);
    const int64_t own = end_ids.dim() == 2 ? b : 0;
    const Rules rules{limit[b], std::max(wait[b], 0), ends.at(own), ends.length(own), ends.width, end_think, newlines};
    Output output{{tail.data() + b * width, tail.data() + (b + 1) * width}, length[b]};
    bool thinks = on[b] != 0, forces = rules.begun(output);
    for (int64_t row = first; row < last; ++row) {
      forced[row] = rules.step(output, thinks, forces);
      if (drafts[row] < 0) break;
      output.tokens.push_back(drafts[row]), ++output.n;
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("thinking_budget", TORCH_BOX(&thinking_budget)); }
