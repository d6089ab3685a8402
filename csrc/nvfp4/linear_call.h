// What nvfp4_linear and nvfp4_linear_fp8 do around their kernels on the CPU: from tensors to a checked problem and y.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "linear.h"

namespace n3::nvfp4_linear {

// y, filled by run(problem), which is not called where y is empty.
template <typename Run>
Tensor fill(const char* op, const Tensor& x, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
            const std::optional<Tensor>& bias, const std::optional<std::string>& activation, const Run& run) {
  Params p = check(x, q, block_scale, global_scale, bias, activation, op);
  const Tensor xc = torch::stable::contiguous(x), qc = torch::stable::contiguous(q),
               sc = torch::stable::contiguous(block_scale);
  std::optional<Tensor> bc;
  if (bias) bc = torch::stable::contiguous(*bias);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.n;
  const Tensor y = torch::stable::new_empty(x, shape);
  if (p.m == 0 || p.n == 0) return y;
  p.x = xc.const_data_ptr();
  p.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  p.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  p.global_scale = static_cast<const float*>(global_scale.const_data_ptr());
  p.bias = bc ? bc->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  run(p);
  return y;
}

}  // namespace n3::nvfp4_linear
