// The contract of n3::mtp_verify: modes and checks. CPU and CUDA; formulas and words in n3kernels/mtp/verify.py.
#pragma once
#include <string>

#include "rows.h"

namespace n3::mtp::verify {

constexpr const char* op = "mtp_verify";

using Mode = VerifyMode;
constexpr const char* kModes[] = {"greedy", "coupled", "token", "block", "relaxed", "typical"};

struct Lossy {
  bool allowed;
  int64_t top_k;
  double delta, epsilon, typical_delta;
};

inline Mode check_mode(const std::string& mode) {
  for (int i = 0; i < 6; ++i) {
    if (mode == kModes[i]) return Mode(i);
  }
  fail(op, "mode must be one of greedy, coupled, token, block, relaxed, typical, got ", mode);
}

inline Mode check(const Tensor& logits, const Tensor& draft_tokens, const Tensor& cu_rows, const Tensor& pos,
                  const std::string& mode_name, int64_t max_drafts, const SlotArgs& slots, const EditArgs& edits,
                  const OptionalTensor& eos_ids, const LawArgs& laws, const Lossy& lossy) {
  check_logits(op, logits);
  check_dtype(op, "draft_tokens", draft_tokens, ScalarType::Int);
  check_shape(op, "draft_tokens", draft_tokens, {logits.size(0)});
  check_cu_rows(op, cu_rows);
  const int64_t b = cu_rows.size(0) - 1;
  check_slots(op, b, slots);
  check_pos(op, pos, b);
  const Mode mode = check_mode(mode_name);
  N3_CHECK(op, max_drafts >= 0, "max_drafts must be at least 0, got ", max_drafts);
  check_ids(op, "eos_ids", eos_ids);
  check_same_device(op, "draft_tokens", draft_tokens, "logits", logits);
  check_same_device(op, "cu_rows", cu_rows, "logits", logits);
  check_same_device(op, "pos", pos, "logits", logits);
  check_slot_devices(op, logits, slots);
  check_devices(op, "logits", logits, {{"eos_ids", &eos_ids}});
  check_edits(op, logits, edits);
  N3_CHECK(op, mode < Mode::kRelaxed || lossy.allowed, "allow_lossy must be True in mode ", mode_name, ", got False");
  N3_CHECK(op, lossy.top_k >= 1, "relaxed_top_k must be at least 1, got ", lossy.top_k);
  check_laws(op, mode_name, logits, slots.seed.size(0), laws);
  return mode;
}

}  // namespace n3::mtp::verify
