// The contract of n3::mtp_verify_tree: arguments, modes and checks. CPU and CUDA; rules and words in
// n3kernels/mtp/verify_tree.py.
#pragma once
#include <string>

#include "operands.h"

namespace n3::mtp::verify_tree {

constexpr const char* op = "mtp_verify_tree";

using Mode = TreeMode;

struct Arguments {
  const Tensor &logits, &node_tokens, &parents, &cu_rows, &pos;
  const std::string& mode;
  int64_t max_depth;
  SlotArgs slots;
  EditArgs edits;
  const OptionalTensor& eos_ids;
  LawArgs laws;
};

inline Mode check_mode(const std::string& mode) {
  if (mode == "greedy") return Mode::kGreedy;
  if (mode == "coupled") return Mode::kCoupled;
  if (mode == "token") return Mode::kToken;
  fail(op, "mode must be one of greedy, coupled, token, got ", mode);
}

inline Mode check(const Arguments& a) {
  const Tensor& logits = a.logits;
  check_logits(op, logits);
  const int64_t n = logits.size(0);
  check_dtype(op, "node_tokens", a.node_tokens, ScalarType::Int);
  check_shape(op, "node_tokens", a.node_tokens, {n});
  check_dtype(op, "parents", a.parents, ScalarType::Int);
  check_shape(op, "parents", a.parents, {n});
  check_cu_rows(op, a.cu_rows);
  const int64_t b = a.cu_rows.size(0) - 1;
  check_slots(op, b, a.slots);
  check_pos(op, a.pos, b);
  const Mode mode = check_mode(a.mode);
  N3_CHECK(op, a.max_depth >= 0, "max_depth must be at least 0, got ", a.max_depth);
  check_ids(op, "eos_ids", a.eos_ids);
  check_same_device(op, "node_tokens", a.node_tokens, "logits", logits);
  check_same_device(op, "parents", a.parents, "logits", logits);
  check_same_device(op, "cu_rows", a.cu_rows, "logits", logits);
  check_same_device(op, "pos", a.pos, "logits", logits);
  check_slot_devices(op, logits, a.slots);
  check_devices(op, "logits", logits, {{"eos_ids", &a.eos_ids}});
  check_edits(op, logits, a.edits);
  check_laws(op, a.mode, logits, a.slots.seed.size(0), a.laws);
  return mode;
}

// A checked call.
struct Call {
  Call(const Arguments& a, Mode mode) : like(a.logits), rows(operands.rows(a.logits, a.slots, a.edits)) {
    const int64_t b = a.cu_rows.size(0) - 1, width = a.max_depth + 1;
    operands.walk(args, a.cu_rows, a.node_tokens, a.pos, a.eos_ids, a.laws, width);
    args.mode = mode, args.parents = operands.data<int32_t>(a.parents);
    out = {operands.output(a.logits, {b, width}, args.tokens), operands.output(a.logits, {b}, args.num_emitted),
           operands.output(a.logits, {b, width}, args.path), operands.output(a.logits, {b, width}, args.logprobs),
           operands.output(a.logits, {b}, args.flags)};
  }

  const Tensor& like;
  Operands operands;
  RowInputs rows;
  TreeArgs args{};
  WalkOutputs out;
};

// The operator as its schema has it; `run` writes the outputs.
template <void (*run)(const Call&)>
WalkOutputs entry(
    const Tensor& logits, const Tensor& node_tokens, const Tensor& parents, const Tensor& cu_rows, const Tensor& seed,
    const Tensor& pos, const std::string& mode, int64_t max_depth, const OptionalTensor& slot,
    const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
    const OptionalTensor& min_p, const OptionalTensor& bitmask, const OptionalTensor& bitmask_row,
    const OptionalTensor& forced_token, const OptionalTensor& bias_ids, const OptionalTensor& bias_val,
    const OptionalTensor& bias_cu, const OptionalTensor& eos_ids, const OptionalTensor& draft_ids,
    const OptionalTensor& draft_probs, const OptionalTensor& draft_vocab, const OptionalTensor& uniforms) {
  const Arguments a{logits, node_tokens, parents, cu_rows, pos, mode, max_depth,
                    {seed, slot, temperature, top_k, top_p, min_p},
                    {bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu},
                    eos_ids,
                    {draft_ids, draft_probs, none, none, draft_vocab, uniforms}};
  const Call call(a, check(a));
  run(call);
  return call.out;
}

}  // namespace n3::mtp::verify_tree
