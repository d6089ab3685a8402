// From the tensors of a call to the arguments of the kernels that quantise: shared by nvfp4_quantize and the fused
// producers.
#pragma once
#include "../common/cuda.h"
#include "quantize.h"
#include "quantize_plan.h"

namespace n3::nvfp4_quantize {

struct Launcher {
  const char* op;
  cudaStream_t stream;
  uint32_t limit = kMaxBlocks;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), uint32_t blocks, const Arguments&... arguments) const {
    kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
    N3_CUDA_CHECK(op, cudaGetLastError());
  }
};

// Rows that can be read where they lie, or a copy; `transposed`: x.mT counts among the former.
struct Readable {
  Tensor kept;  // holds the copy
  Matrices m;
};

inline Readable readable(const Tensor& x, bool transposed) {
  if (const auto m = matrices_of(x)) {
    const bool numbered = m->batches == 1 || m->batches * m->rows < int64_t(1) << 31;
    if (numbered && (transposed || m->k_stride == 1)) return {x, *m};
  }
  const Tensor copy = aligned(x);
  return {copy, *matrices_of(copy)};
}

inline Rows rows_of(const Readable& x) {
  const Matrices& m = x.m;
  const int64_t element = x.kept.scalar_type() == ScalarType::Float ? 4 : 2;
  return rows_at(m.data, m.batches, m.rows, m.batch_stride, m.row_stride, m.k_stride, element);
}

inline Args args_of(const Params& p, const Readable& x) {
  Args args{};
  args.x = rows_of(x);
  args.k_stride = x.kept.numel() ? x.m.k_stride : 1;  // of nothing there is no order
  args.rows = p.form.per_row ? p.globals : p.rows;    // rows of no elements have global scales too
  args.ks = p.k / 16;
  args.q = p.q, args.block_scale = p.block_scale, args.global_out = p.global_out;
  args.given = p.global_scale, args.signs = p.signs, args.seed = p.seed;
  args.four_over_six = p.form.four_over_six, args.mse = p.form.mse, args.per_row = p.form.per_row;
  args.swizzled = p.form.swizzled, args.square = p.square;
  return args;
}

// Contiguous and aligned; where there is none x, as a Tensor has to be something.
inline Tensor aligned_or(const std::optional<Tensor>& t, const Tensor& x) { return t ? aligned(*t) : x; }

inline Tensor words(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, std::vector<int64_t>{count}, ScalarType::Int);
}

inline uint32_t* data_of(const Tensor& words) { return static_cast<uint32_t*>(words.mutable_data_ptr()); }

// Calls f with a null pointer of the element type.
template <typename F>
void with_type(ScalarType dtype, F f) {
  switch (dtype) {  // the checks let nothing else through
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Half: return f(static_cast<device::F16*>(nullptr));
    default: return f(static_cast<device::BF16*>(nullptr));
  }
}

}  // namespace n3::nvfp4_quantize
