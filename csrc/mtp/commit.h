// mtp_commit: what an engine does with the counts of a verification. Checks for CPU and CUDA; rules in
// n3kernels/mtp/commit.py.
#pragma once
#include "rows.h"

namespace n3::mtp_commit {

using mtp::OptionalTensor;

constexpr const char* op = "mtp_commit";

struct Params {
  int64_t requests, width, slots, ring_size, ring_tokens;
};

inline Params check(const Tensor& tokens, const Tensor& num_emitted, const Tensor& cu_rows, const Tensor& seq_len,
                    const OptionalTensor& slot, const OptionalTensor& eos_ids, const OptionalTensor& max_len,
                    const OptionalTensor& finished, const OptionalTensor& histogram, const OptionalTensor& ring_pos,
                    int64_t ring_size, int64_t ring_tokens) {
  check_dtype(op, "tokens", tokens, ScalarType::Int);
  check_dim(op, "tokens", tokens, 2);
  const int64_t b = tokens.size(0), width = tokens.size(1);
  N3_CHECK(op, width >= 1, "tokens must have at least 1 column, got ", width);
  check_dtype(op, "seq_len", seq_len, ScalarType::Int);
  check_dim(op, "seq_len", seq_len, 1);
  const int64_t slots = seq_len.size(0);
  check_dtype(op, "num_emitted", num_emitted, ScalarType::Int);
  check_shape(op, "num_emitted", num_emitted, {b});
  check_dtype(op, "cu_rows", cu_rows, ScalarType::Int);
  check_shape(op, "cu_rows", cu_rows, {b + 1});
  mtp::check_given(op, "slot", slot, ScalarType::Int, {b});
  mtp::check_given(op, "max_len", max_len, ScalarType::Int, {slots});
  mtp::check_given(op, "finished", finished, ScalarType::Int, {slots});
  N3_CHECK(op, slot || slots >= b, "seq_len must have at least ", b, " elements when slot is None, got ", slots);
  mtp::check_ids(op, "eos_ids", eos_ids);
  if (histogram) {
    check_dtype(op, "histogram", *histogram, ScalarType::Long);
    check_dim(op, "histogram", *histogram, 1);
    N3_CHECK(op, histogram->size(0) >= 1, "histogram must have at least 1 element, got ", histogram->size(0));
  }
  if (ring_pos) {
    mtp::check_given(op, "ring_pos", ring_pos, ScalarType::Int, {slots, 2});
    N3_CHECK(op, ring_tokens >= 1, "ring_tokens must be at least 1 with ring_pos, got ", ring_tokens);
    N3_CHECK(op, ring_size >= 2 * ring_tokens, "ring_size must be at least ", 2 * ring_tokens, ", got ", ring_size);
  }
  check_same_device(op, "num_emitted", num_emitted, "tokens", tokens);
  check_same_device(op, "cu_rows", cu_rows, "tokens", tokens);
  check_same_device(op, "seq_len", seq_len, "tokens", tokens);
  mtp::check_devices(op, "tokens", tokens,
                     {{"slot", &slot}, {"eos_ids", &eos_ids}, {"max_len", &max_len}, {"finished", &finished},
                      {"histogram", &histogram}, {"ring_pos", &ring_pos}});
  return {b, width, slots, ring_size, ring_tokens};
}

}  // namespace n3::mtp_commit
