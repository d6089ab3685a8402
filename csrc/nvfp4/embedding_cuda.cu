#include "embedding.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "embedding_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace embedding = n3::nvfp4_embedding;

template <typename Id, typename T>
void launch(const embedding::Params& p, cudaStream_t stream) {
  const int64_t ks = p.k / 16, groups = p.count * ks;
  if (groups == 0) return;  // a grid of 0 blocks is a launch error
  const int64_t blocks = (groups + embedding::kThreads - 1) / embedding::kThreads;
  embedding::embedding_kernel<Id, T><<<blocks, embedding::kThreads, 0, stream>>>(
      static_cast<const Id*>(p.ids), p.q, p.block_scale, p.global_scale, static_cast<T*>(p.y), groups, p.n, ks);
  N3_CUDA_CHECK(embedding::op, cudaGetLastError());
}

template <typename T>
void launch(const embedding::Params& p, ScalarType ids, cudaStream_t stream) {
  ids == ScalarType::Int ? launch<int32_t, T>(p, stream) : launch<int64_t, T>(p, stream);
}

Tensor nvfp4_embedding(const Tensor& ids, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
                       ScalarType dtype) {
  embedding::Params p = embedding::check(ids, q, block_scale, global_scale, dtype);
  const n3::DeviceGuard guard(ids.get_device_index());
  const Tensor ic = torch::stable::contiguous(ids), qc = n3::aligned(q), sc = torch::stable::contiguous(block_scale);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(p.k);
  const Tensor y = torch::stable::new_empty(ids, shape, dtype);
  p.ids = ic.const_data_ptr();
  p.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  p.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  p.global_scale = static_cast<const float*>(global_scale.const_data_ptr());
  p.y = y.mutable_data_ptr();
  const cudaStream_t stream = n3::current_stream(embedding::op, ids);
  switch (dtype) {  // check() let nothing else through
    case ScalarType::Float: launch<float>(p, ids.scalar_type(), stream); break;
    case ScalarType::Half: launch<n3::device::F16>(p, ids.scalar_type(), stream); break;
    default: launch<n3::device::BF16>(p, ids.scalar_type(), stream);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_embedding", TORCH_BOX(&nvfp4_embedding)); }
