// The arguments that the operators on rows of logits share, their checks, and how a kernel sees them. CPU and CUDA; the
// words are those of n3kernels/mtp/sample.py and verify.py.
#pragma once
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "../common/check.h"
#include "plan.h"

namespace n3::mtp {

using OptionalTensor = std::optional<Tensor>;

inline const OptionalTensor none;

// Sampling parameters by slot, and which slot each row or request has.
struct SlotArgs {
  const Tensor& seed;
  const OptionalTensor &slot, &temperature, &top_k, &top_p, &min_p;
};

// What changes single rows of logits.
struct EditArgs {
  const OptionalTensor &bitmask, &bitmask_row, &forced_token, &bias_ids, &bias_val, &bias_cu;
};

inline void check_logits(const char* op, const Tensor& logits) {
  check_dim(op, "logits", logits, 2);
  check_floating(op, "logits", logits.scalar_type());
  N3_CHECK(op, logits.size(1) >= 1, "logits must have at least 1 column, got ", logits.size(1));
  N3_CHECK(op, logits.size(1) == 1 || logits.stride(1) == 1,
           "logits must have stride 1 along the last dimension, got ", logits.stride(1));
}

inline void check_given(const char* op, const char* name, const OptionalTensor& t, ScalarType dtype,
                        std::initializer_list<int64_t> shape) {
  if (!t) return;
  check_dtype(op, name, *t, dtype);
  check_shape(op, name, *t, shape);
}

inline void check_devices(const char* op, const char* other, const Tensor& o,
                          std::initializer_list<std::pair<const char*, const OptionalTensor*>> tensors) {
  for (const auto& [name, t] : tensors) {
    if (*t) check_same_device(op, name, **t, other, o);
  }
}

// n rows or requests choose their slots.
inline void check_slots(const char* op, int64_t n, const SlotArgs& s) {
  check_dtype(op, "seed", s.seed, ScalarType::Long);
  check_dim(op, "seed", s.seed, 1);
  const int64_t slots = s.seed.size(0);
  if (s.slot) {
    check_given(op, "slot", s.slot, ScalarType::Int, {n});
  } else {
    N3_CHECK(op, slots >= n, "seed must have at least ", n, " elements when slot is None, got ", slots);
  }
  check_given(op, "temperature", s.temperature, ScalarType::Float, {slots});
  check_given(op, "top_k", s.top_k, ScalarType::Int, {slots});
  check_given(op, "top_p", s.top_p, ScalarType::Float, {slots});
  check_given(op, "min_p", s.min_p, ScalarType::Float, {slots});
}

inline void check_pos(const char* op, const Tensor& pos, int64_t n) {
  check_dtype(op, "pos", pos, ScalarType::Long);
  check_shape(op, "pos", pos, {n});
}

inline void check_slot_devices(const char* op, const Tensor& logits, const SlotArgs& s) {
  check_same_device(op, "seed", s.seed, "logits", logits);
  check_devices(op, "logits", logits,
                {{"slot", &s.slot}, {"temperature", &s.temperature}, {"top_k", &s.top_k}, {"top_p", &s.top_p},
                 {"min_p", &s.min_p}});
}

inline void check_ids(const char* op, const char* name, const OptionalTensor& ids) {
  if (!ids) return;
  check_dtype(op, name, *ids, ScalarType::Int);
  check_dim(op, name, *ids, 1);
}

inline void check_edits(const char* op, const Tensor& logits, const EditArgs& e) {
  const int64_t n = logits.size(0), vocab = logits.size(1);
  if (e.bitmask) {
    check_dtype(op, "bitmask", *e.bitmask, ScalarType::Int);
    check_dim(op, "bitmask", *e.bitmask, 2);
    check_shape(op, "bitmask", *e.bitmask, {e.bitmask_row ? e.bitmask->size(0) : n, (vocab + 31) / 32});
  }
  if (e.bitmask_row) {
    N3_CHECK(op, e.bitmask.has_value(), "bitmask_row must be None when bitmask is None");
    check_given(op, "bitmask_row", e.bitmask_row, ScalarType::Int, {n});
  }
  check_given(op, "forced_token", e.forced_token, ScalarType::Int, {n});
  const int given = e.bias_ids.has_value() + e.bias_val.has_value() + e.bias_cu.has_value();
  N3_CHECK(op, given == 0 || given == 3, "bias_ids, bias_val and bias_cu must be given together, got ", given, " of 3");
  if (given == 3) {
    check_ids(op, "bias_ids", e.bias_ids);
    check_given(op, "bias_val", e.bias_val, ScalarType::Float, {e.bias_ids->size(0)});
    check_given(op, "bias_cu", e.bias_cu, ScalarType::Int, {n + 1});
  }
  check_devices(op, "logits", logits,
                {{"bitmask", &e.bitmask}, {"bitmask_row", &e.bitmask_row}, {"forced_token", &e.forced_token},
                 {"bias_ids", &e.bias_ids}, {"bias_val", &e.bias_val}, {"bias_cu", &e.bias_cu}});
}

inline void check_cu_rows(const char* op, const Tensor& cu_rows) {
  check_dtype(op, "cu_rows", cu_rows, ScalarType::Int);
  check_dim(op, "cu_rows", cu_rows, 1);
  N3_CHECK(op, cu_rows.size(0) >= 1, "cu_rows must have at least 1 element, got ", cu_rows.size(0));
}

// The laws of the drafts, and the numbers in place of Philox's.
struct LawArgs {
  const OptionalTensor &draft_ids, &draft_probs, &draft_logits, &draft_temperature, &draft_vocab, &uniforms;
};

inline void check_laws(const char* op, const std::string& mode, const Tensor& logits, int64_t slots,
                       const LawArgs& a) {
  const int64_t n = logits.size(0);
  const std::initializer_list<std::pair<const char*, const OptionalTensor*>> laws = {
      {"draft_ids", &a.draft_ids}, {"draft_probs", &a.draft_probs}, {"draft_logits", &a.draft_logits},
      {"draft_temperature", &a.draft_temperature}, {"draft_vocab", &a.draft_vocab}, {"uniforms", &a.uniforms}};
  for (const auto& [name, t] : laws) {
    N3_CHECK(op, !*t || mode == "token" || mode == "block", name, " must be None in mode ", mode);
  }
  const int given = a.draft_ids.has_value() + a.draft_probs.has_value();
  N3_CHECK(op, given != 1, "draft_ids and draft_probs must be given together or not at all, got ", given, " of 2");
  if (given) {
    N3_CHECK(op, !a.draft_logits, "draft_logits must be None with draft_ids");
    check_dtype(op, "draft_ids", *a.draft_ids, ScalarType::Int);
    check_dim(op, "draft_ids", *a.draft_ids, 2);
    const int64_t m = a.draft_ids->size(1);
    N3_CHECK(op, m >= 1 && m <= kMaxDraftIds, "draft_ids must have 1 to ", kMaxDraftIds, " columns, got ", m);
    check_given(op, "draft_ids", a.draft_ids, ScalarType::Int, {n, m});
    check_given(op, "draft_probs", a.draft_probs, ScalarType::Float, {n, m});
  }
  if (a.draft_vocab) {
    check_ids(op, "draft_vocab", a.draft_vocab);
    N3_CHECK(op, a.draft_vocab->size(0) >= 1, "draft_vocab must have at least 1 element, got ",
             a.draft_vocab->size(0));
  }
  if (a.draft_logits) {
    check_floating(op, "draft_logits", a.draft_logits->scalar_type());
    check_dim(op, "draft_logits", *a.draft_logits, 2);
    check_shape(op, "draft_logits", *a.draft_logits, {n, a.draft_vocab ? a.draft_vocab->size(0) : logits.size(1)});
  }
  if (a.draft_temperature) {
    N3_CHECK(op, a.draft_logits.has_value(), "draft_temperature must be None without draft_logits");
    check_given(op, "draft_temperature", a.draft_temperature, ScalarType::Float, {slots});
  }
  check_given(op, "uniforms", a.uniforms, ScalarType::Double, {n, 2});
  check_devices(op, "logits", logits, laws);
}

}  // namespace n3::mtp
