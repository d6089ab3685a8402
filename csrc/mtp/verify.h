// The contract of n3::mtp_verify: arguments, modes and checks. CPU and CUDA; formulas and words in
// n3kernels/mtp/verify.py.
#pragma once
#include <string>

#include "operands.h"

namespace n3::mtp::verify {

constexpr const char* op = "mtp_verify";

using Mode = VerifyMode;
constexpr const char* kModes[] = {"greedy", "coupled", "token", "block", "relaxed", "typical"};

struct Lossy {
  bool allowed;
  int64_t top_k;
  double delta, epsilon, typical_delta;
};

struct Arguments {
  const Tensor &logits, &draft_tokens, &cu_rows, &pos;
  const std::string& mode;
  int64_t max_drafts;
  SlotArgs slots;
  EditArgs edits;
  const OptionalTensor& eos_ids;
  LawArgs laws;
  Lossy lossy;
};

inline Mode check_mode(const std::string& mode) {
  for (int i = 0; i < 6; ++i) {
    if (mode == kModes[i]) return Mode(i);
  }
  fail(op, "mode must be one of greedy, coupled, token, block, relaxed, typical, got ", mode);
}

inline Mode check(const Arguments& a) {
  const Tensor& logits = a.logits;
  check_logits(op, logits);
  check_dtype(op, "draft_tokens", a.draft_tokens, ScalarType::Int);
  check_shape(op, "draft_tokens", a.draft_tokens, {logits.size(0)});
  check_cu_rows(op, a.cu_rows);
  const int64_t b = a.cu_rows.size(0) - 1;
  check_slots(op, b, a.slots);
  check_pos(op, a.pos, b);
  const Mode mode = check_mode(a.mode);
  N3_CHECK(op, a.max_drafts >= 0, "max_drafts must be at least 0, got ", a.max_drafts);
  check_ids(op, "eos_ids", a.eos_ids);
  check_same_device(op, "draft_tokens", a.draft_tokens, "logits", logits);
  check_same_device(op, "cu_rows", a.cu_rows, "logits", logits);
  check_same_device(op, "pos", a.pos, "logits", logits);
  check_slot_devices(op, logits, a.slots);
  check_devices(op, "logits", logits, {{"eos_ids", &a.eos_ids}});
  check_edits(op, logits, a.edits);
  N3_CHECK(op, mode < Mode::kRelaxed || a.lossy.allowed, "allow_lossy must be True in mode ", a.mode, ", got False");
  N3_CHECK(op, a.lossy.top_k >= 1, "relaxed_top_k must be at least 1, got ", a.lossy.top_k);
  check_laws(op, a.mode, logits, a.slots.seed.size(0), a.laws);
  return mode;
}

// A checked call. `drafter`: the rows of its logits, if laws are dense; else it has none.
struct Call {
  Call(const Arguments& a, Mode mode) : like(a.logits), rows(operands.rows(a.logits, a.slots, a.edits)) {
    const int64_t b = a.cu_rows.size(0) - 1, width = a.max_drafts + 1;
    operands.walk(args, a.cu_rows, a.draft_tokens, a.pos, a.eos_ids, a.laws, width);
    args.mode = mode, args.relaxed_top_k = a.lossy.top_k, args.relaxed_delta = a.lossy.delta;
    args.typical_epsilon = a.lossy.epsilon, args.typical_delta = a.lossy.typical_delta;
    out = {operands.output(a.logits, {b, width}, args.tokens), operands.output(a.logits, {b}, args.num_emitted),
           operands.output(a.logits, {b}, args.last_row), operands.output(a.logits, {b, width}, args.logprobs),
           operands.output(a.logits, {b}, args.flags)};
    if (!a.laws.draft_logits) return;
    const Tensor& t = *a.laws.draft_logits;
    drafter = operands.rows(t.stride(1) == 1 ? t : torch::stable::contiguous(t),
                            {a.slots.seed, a.slots.slot, a.laws.draft_temperature, none, none, none},
                            {none, none, none, none, none, none});
  }

  const Tensor& like;
  Operands operands;
  RowInputs rows, drafter{};
  VerifyArgs args{};
  WalkOutputs out;
};

// The operator as its schema has it; `run` writes the outputs.
template <void (*run)(const Call&)>
WalkOutputs entry(
    const Tensor& logits, const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& seed, const Tensor& pos,
    const std::string& mode, int64_t max_drafts, const OptionalTensor& slot, const OptionalTensor& temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p,
    const OptionalTensor& bitmask, const OptionalTensor& bitmask_row, const OptionalTensor& forced_token,
    const OptionalTensor& bias_ids, const OptionalTensor& bias_val, const OptionalTensor& bias_cu,
    const OptionalTensor& eos_ids, const OptionalTensor& draft_ids, const OptionalTensor& draft_probs,
    const OptionalTensor& draft_logits, const OptionalTensor& draft_temperature, const OptionalTensor& draft_vocab,
    bool allow_lossy, int64_t relaxed_top_k, double relaxed_delta, double typical_epsilon, double typical_delta,
    const OptionalTensor& uniforms) {
  const Arguments a{logits, draft_tokens, cu_rows, pos, mode, max_drafts,
                    {seed, slot, temperature, top_k, top_p, min_p},
                    {bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu},
                    eos_ids,
                    {draft_ids, draft_probs, draft_logits, draft_temperature, draft_vocab, uniforms},
                    {allow_lossy, relaxed_top_k, relaxed_delta, typical_epsilon, typical_delta}};
  const Call call(a, check(a));
  run(call);
  return call.out;
}

}  // namespace n3::mtp::verify
