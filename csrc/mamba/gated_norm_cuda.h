// What the launchers of gated_rms_norm and of its gradient share.
#pragma once
#include "gated_norm.h"
#include "gated_norm_kernel.cuh"
#include "operands_cuda.h"

namespace n3::gated_norm {

// Rows of x, z or grad_y: in place where one stride leads from row to row, else contiguous in `room`.
inline mamba::Operand rows_in(const Tensor& t, Tensor& room) {
  const mamba::Operand o = rows_of(t);
  if (o.data || t.numel() == 0) return o;
  room = torch::stable::contiguous(t);
  return rows_of(room);
}

// Everything but y.
inline Args args_of(const Params& p) {
  return {mamba::view_of(p.x), mamba::view_of(p.z), mamba::view_of(p.weight), nullptr, p.rows,
          p.dim ? p.dim / p.group_size : 0, p.group_size, p.eps, p.norm_before_gate};
}

// Rows that begin at multiples of 16 bytes, of neighbouring elements; of a weight `row_stride` is 0.
inline bool aligned_rows(const mamba::Operand& o, int64_t row_stride, int64_t stride) {
  return !o.data || (stride == 1 && row_stride % kChunk == 0 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0);
}

inline bool in_vectors(const Params& p) {
  return p.group_size % kChunk == 0 && aligned_rows(p.x, p.x.strides[0], p.x.strides[1]) &&
         aligned_rows(p.z, p.z.strides[0], p.z.strides[1]) && aligned_rows(p.weight, 0, p.weight.strides[0]);
}

inline void check_groups(const char* op, int64_t groups) {
  N3_CHECK(op, groups < kMostGroups, "the CUDA kernel takes fewer than 2^32 groups, got ", groups);
}

}  // namespace n3::gated_norm
