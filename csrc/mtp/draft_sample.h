// The contract of n3::mtp_draft_sample: checks. CPU and CUDA; formulas and words in n3kernels/mtp/draft_sample.py.
#pragma once
#include "rows.h"

namespace n3::mtp::draft_sample {

constexpr const char* op = "mtp_draft_sample";

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

}  // namespace n3::mtp::draft_sample
