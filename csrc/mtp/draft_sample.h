// The contract of n3::mtp_draft_sample: arguments and checks. CPU and CUDA; formulas and words in
// n3kernels/mtp/draft_sample.py.
#pragma once
#include "operands.h"

namespace n3::mtp::draft_sample {

constexpr const char* op = "mtp_draft_sample";

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

inline void check(const Tensor& logits, const Tensor& pos, int64_t max_ids, const SlotArgs& slots,
                  const OptionalTensor& draft_vocab) {
  check_logits(op, logits);
  const int64_t n = logits.size(0), vocab = logits.size(1);
  check_slots(op, n, slots);
  check_pos(op, pos, n);
  N3_CHECK(op, max_ids >= 1 && max_ids <= kMaxDraftIds, "max_ids must be between 1 and ", kMaxDraftIds, ", got ",
           max_ids);
  check_given(op, "draft_vocab", draft_vocab, ScalarType::Int, {vocab});
  check_slot_devices(op, logits, slots);
  check_same_device(op, "pos", pos, "logits", logits);
  check_devices(op, "logits", logits, {{"draft_vocab", &draft_vocab}});
}

// A checked call.
struct Call {
  Call(const Tensor& logits, const Tensor& pos, int64_t max_ids, const SlotArgs& slots,
       const OptionalTensor& draft_vocab)
      : like(logits), rows(operands.rows(logits, slots, {none, none, none, none, none, none})) {
    const int64_t n = logits.size(0);
    args.pos = operands.data<int64_t>(pos), args.map = operands.data<int32_t>(draft_vocab);
    args.max_ids = int32_t(max_ids);
    out = {operands.output(logits, {n}, args.tokens), operands.output(logits, {n, max_ids}, args.ids),
           operands.output(logits, {n, max_ids}, args.probs)};
  }

  const Tensor& like;
  Operands operands;
  RowInputs rows;
  DraftSampleArgs args{};
  Outputs out;
};

// The operator as its schema has it; `run` writes the outputs.
template <void (*run)(const Call&)>
Outputs entry(const Tensor& logits, const Tensor& seed, const Tensor& pos, int64_t max_ids, const OptionalTensor& slot,
              const OptionalTensor& temperature, const OptionalTensor& draft_vocab) {
  const SlotArgs slots{seed, slot, temperature, none, none, none};
  check(logits, pos, max_ids, slots, draft_vocab);
  const Call call(logits, pos, max_ids, slots, draft_vocab);
  run(call);
  return call.out;
}

}  // namespace n3::mtp::draft_sample
