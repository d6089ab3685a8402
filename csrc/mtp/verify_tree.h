// The contract of n3::mtp_verify_tree: modes and checks. CPU and CUDA; rules and words in n3kernels/mtp/verify_tree.py.
#pragma once
#include <string>

#include "rows.h"

namespace n3::mtp::verify_tree {

constexpr const char* op = "mtp_verify_tree";

using Mode = TreeMode;

inline Mode check_mode(const std::string& mode) {
  if (mode == "greedy") return Mode::kGreedy;
  if (mode == "coupled") return Mode::kCoupled;
  if (mode == "token") return Mode::kToken;
  fail(op, "mode must be one of greedy, coupled, token, got ", mode);
}

inline Mode check(const Tensor& logits, const Tensor& node_tokens, const Tensor& parents, const Tensor& cu_rows,
                  const Tensor& pos, const std::string& mode_name, int64_t max_depth, const SlotArgs& slots,
                  const EditArgs& edits, const OptionalTensor& eos_ids, const LawArgs& laws) {
  check_logits(op, logits);
  const int64_t n = logits.size(0);
  check_dtype(op, "node_tokens", node_tokens, ScalarType::Int);
  check_shape(op, "node_tokens", node_tokens, {n});
  check_dtype(op, "parents", parents, ScalarType::Int);
  check_shape(op, "parents", parents, {n});
  check_cu_rows(op, cu_rows);
  const int64_t b = cu_rows.size(0) - 1;
  check_slots(op, b, slots);
  check_pos(op, pos, b);
  const Mode mode = check_mode(mode_name);
  N3_CHECK(op, max_depth >= 0, "max_depth must be at least 0, got ", max_depth);
  check_ids(op, "eos_ids", eos_ids);
  check_same_device(op, "node_tokens", node_tokens, "logits", logits);
  check_same_device(op, "parents", parents, "logits", logits);
  check_same_device(op, "cu_rows", cu_rows, "logits", logits);
  check_same_device(op, "pos", pos, "logits", logits);
  check_slot_devices(op, logits, slots);
  check_devices(op, "logits", logits, {{"eos_ids", &eos_ids}});
  check_edits(op, logits, edits);
  check_laws(op, mode_name, logits, slots.seed.size(0), laws);
  return mode;
}

}  // namespace n3::mtp::verify_tree
