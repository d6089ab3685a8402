#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "gemm_engine.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace gemm = n3::nvfp4_gemm;
using gemm::OptionalTensor;

Tensor nvfp4_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                  const Tensor& b_scale, const Tensor& b_global, const OptionalTensor& bias, ScalarType out_dtype,
                  const std::string& a_layout, const std::string& b_layout) {
  gemm::Params p =
      gemm::check(a, a_scale, a_global, b, b_scale, b_global, bias, out_dtype, a_layout, b_layout);
  const Tensor y = torch::stable::new_empty(a, {p.m, p.n}, out_dtype);
  if (p.m == 0 || p.n == 0) return y;
  const gemm::Operand a_dense(a, a_scale, a_global, p.a), b_dense(b, b_scale, b_global, p.b);
  OptionalTensor bias_dense;
  if (bias) bias_dense = torch::stable::contiguous(*bias);
  p.bias = bias_dense ? bias_dense->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  gemm::multiply(p, {{0, p.m, 0}});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_gemm", TORCH_BOX(&nvfp4_gemm)); }
