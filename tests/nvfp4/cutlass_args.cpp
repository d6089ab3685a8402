// What csrc/nvfp4/gemm_sm1xx_args.h tells CUTLASS, with C entries for test_gemm_cuda_args.py. Compiled for the host.
#include <cstring>

#include "nvfp4/gemm_sm1xx_args.h"

namespace {

namespace gemm = n3::nvfp4_gemm;
namespace sm1xx = n3::nvfp4_gemm::sm1xx;

gemm::Call call(int64_t m, int64_t n, int64_t k) {
  gemm::Call c{};
  c.m = m, c.n = n, c.k = k;
  return c;
}

}  // namespace

extern "C" {

// The byte of the scale of (row, element k) of a or of b.
int64_t scale_byte(bool of_b, int64_t m, int64_t n, int64_t k_total, int row, int k) {
  const gemm::Call c = call(m, n, k_total);
  const auto layout = of_b ? sm1xx::b_scale_layout(c) : sm1xx::a_scale_layout(c);
  return layout(row, k, 0);
}

// Bytes that the layout spans.
int64_t scale_span(bool of_b, int64_t m, int64_t n, int64_t k) {
  const gemm::Call c = call(m, n, k);
  return cute::cosize(of_b ? sm1xx::b_scale_layout(c) : sm1xx::a_scale_layout(c));
}

// The element of (row, column) of operand 0 a, 1 b, 2 y.
int64_t element(int operand, int64_t m, int64_t n, int64_t k, int64_t row, int64_t col) {
  const gemm::Call c = call(m, n, k);
  const auto stride = operand == 0 ? sm1xx::a_stride(c) : operand == 1 ? sm1xx::b_stride(c) : sm1xx::y_stride(c);
  return cute::crd2idx(cute::make_coord(row, col, int64_t(0)), cute::make_shape(row + 1, col + 1, int64_t(1)), stride);
}

// What lies in memory for a group: its problem, the stride of its rows, the layout of its scales. Returns the bytes.
int group_problem(int m, int n, int k, void* to) {
  const sm1xx::GroupProblem problem{m, n, k};
  std::memcpy(to, &problem, sizeof problem);
  return sizeof problem;
}

int group_stride(int64_t step, void* to) {
  const sm1xx::GroupRowMajor stride{step, {}, {}};
  std::memcpy(to, &stride, sizeof stride);
  return sizeof stride;
}

int group_layout(int m, int n, int k, bool of_b, void* to) {
  const auto shape = cute::make_shape(m, n, k, 1);
  const sm1xx::ScaleLayout layout =
      of_b ? sm1xx::Scales::tile_atom_to_shape_SFB(shape) : sm1xx::Scales::tile_atom_to_shape_SFA(shape);
  std::memcpy(to, &layout, sizeof layout);
  return sizeof layout;
}

}  // extern "C"
