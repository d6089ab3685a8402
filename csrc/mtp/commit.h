// mtp_commit: what an engine does with the counts of a verification. Checks for CPU and CUDA; rules in
// n3kernels/mtp/commit.py.
#pragma once
#include <tuple>

#include "../common/written.h"
#include "commit_request.h"
#include "operands.h"

namespace n3::mtp_commit {

using mtp::OptionalTensor;

constexpr const char* op = "mtp_commit";

inline void check(const Tensor& tokens, const Tensor& num_emitted, const Tensor& cu_rows, const Tensor& seq_len,
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
  check_written(op, "seq_len", seq_len);
  check_written(op, "finished", finished);
  check_written(op, "histogram", histogram);
  check_written(op, "ring_pos", ring_pos);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A checked call.
class Call {
 public:
  Call(const Tensor& tokens, const Tensor& num_emitted, const Tensor& cu_rows, const Tensor& seq_len,
       const OptionalTensor& slot, const OptionalTensor& eos_ids, const OptionalTensor& max_len,
       const OptionalTensor& finished, const OptionalTensor& histogram, const OptionalTensor& ring_pos,
       int64_t ring_size, int64_t ring_tokens)
      : like(tokens) {
    const int64_t b = args.requests = tokens.size(0), width = args.width = tokens.size(1);
    args.tokens = operands_.data<int32_t>(tokens), args.num_emitted = operands_.data<int32_t>(num_emitted);
    args.cu_rows = operands_.data<int32_t>(cu_rows), args.slot = operands_.data<int32_t>(slot);
    args.eos_ids = operands_.data<int32_t>(eos_ids), args.max_len = operands_.data<int32_t>(max_len);
    args.seq_len = data<int32_t>(seq_len), args.seq_stride = seq_len.stride(0), args.slots = seq_len.size(0);
    args.eos = eos_ids ? eos_ids->size(0) : 0;
    args.ring_size = ring_size, args.ring_tokens = ring_tokens;
    if (finished) args.finished = data<int32_t>(*finished), args.finished_stride = finished->stride(0);
    if (histogram) {
      args.histogram = data<int64_t>(*histogram);
      args.histogram_stride = histogram->stride(0), args.bins = histogram->size(0);
    }
    if (ring_pos) {
      args.ring_pos = data<int32_t>(*ring_pos);
      args.ring_strides[0] = ring_pos->stride(0), args.ring_strides[1] = ring_pos->stride(1);
    }
    const auto ints = [&](int32_t*& at, int64_t size) { return operands_.output(tokens, {size}, at); };
    out = {ints(args.num_accepted, b), ints(args.last_token, b), ints(args.last_row, b),      ints(args.kv_start, b),
           ints(args.kv_free, b),      ints(args.flat, b * width), ints(args.cu_emitted, b + 1)};
  }

  const Tensor& like;
  Args args{};
  Outputs out;

 private:
  template <typename T>
  static T* data(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
  }

  mtp::Operands operands_;
};

// The operator as its schema has it; `run` writes the outputs and what is changed in place.
template <void (*run)(const Call&)>
Outputs entry(const Tensor& tokens, const Tensor& num_emitted, const Tensor& cu_rows, const Tensor& seq_len,
              const OptionalTensor& slot, const OptionalTensor& eos_ids, const OptionalTensor& max_len,
              const OptionalTensor& finished, const OptionalTensor& histogram, const OptionalTensor& ring_pos,
              int64_t ring_size, int64_t ring_tokens) {
  check(tokens, num_emitted, cu_rows, seq_len, slot, eos_ids, max_len, finished, histogram, ring_pos, ring_size,
        ring_tokens);
  const Call call(tokens, num_emitted, cu_rows, seq_len, slot, eos_ids, max_len, finished, histogram, ring_pos,
                  ring_size, ring_tokens);
  run(call);
  return call.out;
}

}  // namespace n3::mtp_commit
