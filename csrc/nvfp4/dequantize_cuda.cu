#include "dequantize.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "dequantize_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace dequantize = n3::nvfp4_dequantize;

template <typename T>
void launch(const dequantize::Params& p, cudaStream_t stream) {
  const int64_t ks = p.k / 16, groups = p.rows * ks;
  if (groups == 0) return;  // a grid of 0 blocks is a launch error
  const int64_t blocks = (groups + dequantize::kThreads - 1) / dequantize::kThreads;
  const auto kernel = p.swizzled ? dequantize::dequantize_kernel<T, true> : dequantize::dequantize_kernel<T, false>;
  kernel<<<blocks, dequantize::kThreads, 0, stream>>>(p.q, p.block_scale, p.global_scale, static_cast<T*>(p.y), groups,
                                                      ks, p.global_rows * ks);
  N3_CUDA_CHECK(dequantize::op, cudaGetLastError());
}

Tensor nvfp4_dequantize(const Tensor& q, const Tensor& block_scale, const Tensor& global_scale, ScalarType dtype,
                        const std::string& scale_layout) {
  dequantize::Params p = dequantize::check(q, block_scale, global_scale, dtype, scale_layout);
  const n3::DeviceGuard guard(q.get_device_index());
  const Tensor qc = n3::aligned(q), sc = n3::aligned(block_scale), gc = n3::aligned(global_scale);
  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  shape.back() = p.k;
  const Tensor y = torch::stable::new_empty(q, shape, dtype);
  p.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  p.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  p.global_scale = static_cast<const float*>(gc.const_data_ptr());
  p.y = y.mutable_data_ptr();
  const cudaStream_t stream = n3::current_stream(dequantize::op, q);
  switch (dtype) {  // check() let nothing else through
    case ScalarType::Float: launch<float>(p, stream); break;
    case ScalarType::Half: launch<n3::device::F16>(p, stream); break;
    default: launch<n3::device::BF16>(p, stream);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_dequantize", TORCH_BOX(&nvfp4_dequantize)); }
