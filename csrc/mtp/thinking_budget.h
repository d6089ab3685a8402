// thinking_budget: the token that each row must emit to end its thinking. Checks for CPU and CUDA; rules in
// n3kernels/mtp/thinking_budget.py.
#pragma once
#include <algorithm>

#include "operands.h"
#include "thinking_rules.h"

namespace n3::thinking_budget {

constexpr const char* op = "thinking_budget";

inline void check_strings(const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Int);
  N3_CHECK(op, t.dim() == 1 || t.dim() == 2, name, " must have 1 or 2 dimensions, got ", t.dim());
}

inline void check(const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& tail, const Tensor& num_output,
                  const Tensor& active, const Tensor& budget, const Tensor& grace, const Tensor& end_ids,
                  const Tensor& end_think_ids, const Tensor& newline_bitmask) {
  check_dtype(op, "draft_tokens", draft_tokens, ScalarType::Int);
  check_dim(op, "draft_tokens", draft_tokens, 1);
  mtp::check_cu_rows(op, cu_rows);
  const int64_t b = cu_rows.size(0) - 1;
  check_dtype(op, "committed_tail", tail, ScalarType::Int);
  check_dim(op, "committed_tail", tail, 2);
  check_shape(op, "committed_tail", tail, {b, tail.size(1)});
  const std::pair<const char*, const Tensor*> by_request[] = {
      {"num_output", &num_output}, {"active", &active}, {"budget", &budget}, {"grace", &grace}};
  for (const auto& [name, t] : by_request) {
    check_dtype(op, name, *t, ScalarType::Int);
    check_shape(op, name, *t, {b});
  }
  check_strings("end_ids", end_ids);
  check_strings("end_think_ids", end_think_ids);
  if (end_ids.dim() == 2) check_shape(op, "end_ids", end_ids, {b, end_ids.size(1)});
  check_dtype(op, "newline_bitmask", newline_bitmask, ScalarType::Int);
  check_dim(op, "newline_bitmask", newline_bitmask, 1);
  const int64_t longest =
      std::max<int64_t>({end_ids.size(end_ids.dim() - 1), end_think_ids.size(end_think_ids.dim() - 1), 1});
  N3_CHECK(op, tail.size(1) >= longest, "committed_tail must have at least ", longest,
           " columns, the length of the longest end string, got ", tail.size(1));
  const std::pair<const char*, const Tensor*> others[] = {
      {"cu_rows", &cu_rows}, {"committed_tail", &tail}, {"num_output", &num_output}, {"active", &active},
      {"budget", &budget}, {"grace", &grace}, {"end_ids", &end_ids}, {"end_think_ids", &end_think_ids},
      {"newline_bitmask", &newline_bitmask}};
  for (const auto& [name, t] : others) check_same_device(op, name, *t, "draft_tokens", draft_tokens);
}

// A checked call.
class Call {
 public:
  Call(const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& tail, const Tensor& num_output,
       const Tensor& active, const Tensor& budget, const Tensor& grace, const Tensor& end_ids,
       const Tensor& end_think_ids, const Tensor& newline_bitmask)
      : like(draft_tokens), out(mtp::Operands::output(draft_tokens, {draft_tokens.size(0)}, args.forced)) {
    const auto ints = [&](const Tensor& t) { return operands_.data<int32_t>(t); };
    args.drafts = ints(draft_tokens), args.cu_rows = ints(cu_rows), args.tail = ints(tail);
    args.num_output = ints(num_output), args.active = ints(active);
    args.budget = ints(budget), args.grace = ints(grace);
    args.end_ids = ints(end_ids), args.end_think_ids = ints(end_think_ids), args.newlines = ints(newline_bitmask);
    args.rows = draft_tokens.size(0), args.requests = cu_rows.size(0) - 1, args.reach = tail.size(1);
    args.end_size = end_ids.size(end_ids.dim() - 1), args.end_step = end_ids.dim() == 2 ? args.end_size : 0;
    args.strings = end_think_ids.dim() == 2 ? end_think_ids.size(0) : 1;
    args.string_size = end_think_ids.size(end_think_ids.dim() - 1), args.words = newline_bitmask.size(0);
  }

  const Tensor& like;
  Args args{};
  Tensor out;

 private:
  mtp::Operands operands_;
};

// The operator as its schema has it; `run` writes the output.
template <void (*run)(const Call&)>
Tensor entry(const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& committed_tail, const Tensor& num_output,
             const Tensor& active, const Tensor& budget, const Tensor& grace, const Tensor& end_ids,
             const Tensor& end_think_ids, const Tensor& newline_bitmask) {
  check(draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids, end_think_ids,
        newline_bitmask);
  const Call call(draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids, end_think_ids,
                  newline_bitmask);
  run(call);
  return call.out;
}

}  // namespace n3::thinking_budget
