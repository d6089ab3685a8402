#include "repack.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "repack_kernel.cuh"

namespace {

using n3::Tensor;
namespace repack = n3::nvfp4_repack;

Tensor nvfp4_repack(const Tensor& q, const Tensor& block_scale) {
  repack::Weights w = repack::check(q, block_scale);
  const n3::DeviceGuard guard(q.get_device_index());
  const Tensor qc = torch::stable::contiguous(q), sc = torch::stable::contiguous(block_scale);
  const int64_t rows = repack::row_tiles(w.n);
  const Tensor blob = torch::stable::new_empty(q, {rows, repack::row_bytes(w.k)});
  if (rows == 0) return blob;  // a grid of 0 blocks is a launch error
  w.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  w.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  repack::repack_kernel<<<uint32_t(rows), repack::kThreads, 0, n3::current_stream(repack::op, q)>>>(
      w, static_cast<uint8_t*>(blob.mutable_data_ptr()));
  N3_CUDA_CHECK(repack::op, cudaGetLastError());
  return blob;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_repack", TORCH_BOX(&nvfp4_repack)); }
