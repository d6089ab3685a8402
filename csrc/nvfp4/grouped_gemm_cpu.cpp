#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "gemm_engine.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace gemm = n3::nvfp4_gemm;

// The buffers of packed rows hold M of them, so no two experts may share one.
void check_offsets(const gemm::Params& p) {
  const char* op = "nvfp4_grouped_gemm";
  for (int64_t e = 0, before = 0; e <= p.experts; ++e) {
    const int64_t end = p.offsets[e];
    N3_CHECK(op, end >= 0 && end <= p.m, "offsets must be between 0 and ", p.m, ", got ", end);
    N3_CHECK(op, end >= before, "offsets must not fall, got ", end, " after ", before);
    before = end;
  }
}

// The rows of every expert.
std::vector<gemm::Segment> segments_of(const gemm::Params& p) {
  std::vector<gemm::Segment> segments;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t first = p.offsets[e], end = p.offsets[e + 1];
    if (first < end) segments.push_back({first, end - first, e});
  }
  return segments;
}

void clear_other_rows(const gemm::Params& p, const std::vector<gemm::Segment>& segments, int64_t row_bytes) {
  int64_t row = 0;
  const auto clear_to = [&](int64_t end) {
    if (row < end) std::memset(static_cast<char*>(p.y) + row * row_bytes, 0, (end - row) * row_bytes);
  };
  for (const gemm::Segment& s : segments) {
    clear_to(s.first);
    row = s.first + s.tokens;
  }
  clear_to(p.m);
}

Tensor nvfp4_grouped_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                          const Tensor& b_scale, const Tensor& b_global, const Tensor& offsets, ScalarType out_dtype,
                          const std::string& b_layout) {
  gemm::Params p = gemm::check_grouped(a, a_scale, a_global, b, b_scale, b_global, offsets, out_dtype, b_layout);
  const Tensor offsets_dense = torch::stable::contiguous(offsets);
  p.offsets = static_cast<const int32_t*>(offsets_dense.const_data_ptr());
  check_offsets(p);
  const Tensor y = torch::stable::new_empty(a, {p.m, p.n}, out_dtype);
  if (p.m == 0 || p.n == 0) return y;
  const gemm::Operand a_dense(a, a_scale, a_global, p.a), b_dense(b, b_scale, b_global, p.b);
  p.y = y.mutable_data_ptr();
  const std::vector<gemm::Segment> segments = segments_of(p);
  clear_other_rows(p, segments, p.n * (out_dtype == ScalarType::Float ? 4 : 2));
  gemm::multiply(p, segments);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_grouped_gemm", TORCH_BOX(&nvfp4_grouped_gemm)); }
