// The contract of n3::sample: arguments and checks. CPU and CUDA; rules and words in n3kernels/mtp/sample.py.
#pragma once
#include "operands.h"

namespace n3::mtp::sampling {

constexpr const char* op = "sample";

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

inline void check(const Tensor& logits, const Tensor& pos, const SlotArgs& slots, const EditArgs& edits) {
  check_logits(op, logits);
  check_slots(op, logits.size(0), slots);
  check_pos(op, pos, logits.size(0));
  check_slot_devices(op, logits, slots);
  check_same_device(op, "pos", pos, "logits", logits);
  check_edits(op, logits, edits);
}

// A checked call.
struct Call {
  Call(const Tensor& logits, const Tensor& pos, const SlotArgs& slots, const EditArgs& edits)
      : like(logits), rows(operands.rows(logits, slots, edits)) {
    const int64_t n = logits.size(0);
    args.pos = operands.data<int64_t>(pos);
    out = {operands.output(logits, {n}, args.tokens), operands.output(logits, {n}, args.logprobs),
           operands.output(logits, {n}, args.flags)};
  }

  const Tensor& like;
  Operands operands;
  RowInputs rows;
  SampleArgs args{};
  Outputs out;
};

// The operator as its schema has it; `run` writes the outputs.
template <void (*run)(const Call&)>
Outputs entry(const Tensor& logits, const Tensor& seed, const Tensor& pos, const OptionalTensor& slot,
              const OptionalTensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
              const OptionalTensor& min_p, const OptionalTensor& bitmask, const OptionalTensor& bitmask_row,
              const OptionalTensor& forced_token, const OptionalTensor& bias_ids, const OptionalTensor& bias_val,
              const OptionalTensor& bias_cu) {
  const SlotArgs slots{seed, slot, temperature, top_k, top_p, min_p};
  const EditArgs edits{bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu};
  check(logits, pos, slots, edits);
  const Call call(logits, pos, slots, edits);
  run(call);
  return call.out;
}

}  // namespace n3::mtp::sampling
