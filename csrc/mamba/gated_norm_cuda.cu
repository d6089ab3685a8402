#include "gated_norm.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "gated_norm_kernel.cuh"
#include "operands_cuda.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace norm = n3::gated_norm;
namespace mamba = n3::mamba;

// Rows `stride` elements apart, of neighbouring elements.
bool aligned_rows(const mamba::Operand& o, int64_t row_stride, int64_t stride) {
  return !o.data || (stride == 1 && row_stride % norm::kChunk == 0 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0);
}

template <typename T, bool kVectors>
void launch_vectors(const norm::Args& a, cudaStream_t stream) {
  const norm::Plan plan = norm::plan(a.rows, a.groups, a.group_size);
  if (plan.blocks == 0) return;  // a grid of 0 blocks is a launch error
  const auto kernel = plan.threads == 32    ? norm::forward_kernel<T, 32, kVectors>
                      : plan.threads == 128 ? norm::forward_kernel<T, 128, kVectors>
                                            : norm::forward_kernel<T, 512, kVectors>;
  kernel<<<uint32_t(plan.blocks), norm::block_threads(plan.threads), 0, stream>>>(a);
  N3_CUDA_CHECK(norm::op, cudaGetLastError());
}

template <typename T>
void launch(const norm::Params& p, const norm::Args& a, cudaStream_t stream) {
  const bool vectors = a.group_size % norm::kChunk == 0 && aligned_rows(p.x, p.x.strides[0], p.x.strides[1]) &&
                       aligned_rows(p.z, p.z.strides[0], p.z.strides[1]) &&
                       aligned_rows(p.weight, 0, p.weight.strides[0]);
  vectors ? launch_vectors<T, true>(a, stream) : launch_vectors<T, false>(a, stream);
}

Tensor gated_rms_norm(const Tensor& x, const mamba::OptionalTensor& z, const Tensor& weight, int64_t group_size,
                      double eps, bool norm_before_gate) {
  norm::Params p = norm::check(x, z, weight, group_size, eps, norm_before_gate);
  const n3::DeviceGuard guard(x.get_device_index());
  Tensor xc = x;
  mamba::OptionalTensor zc = z;
  if (!p.x.data) xc = torch::stable::contiguous(x), p.x = norm::rows_of(xc);
  if (z && !p.z.data) zc = torch::stable::contiguous(*z), p.z = norm::rows_of(zc);
  const Tensor y =
      torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  const int64_t groups = p.dim ? p.dim / p.group_size : 0;
  const norm::Args a{mamba::view_of(p.x), mamba::view_of(p.z), mamba::view_of(p.weight), y.mutable_data_ptr(), p.rows,
                     groups, p.group_size, p.eps, p.norm_before_gate};
  const cudaStream_t stream = n3::current_stream(norm::op, x);
  switch (x.scalar_type()) {  // check() let nothing else through
    case ScalarType::Float: launch<float>(p, a, stream); break;
    case ScalarType::Half: launch<n3::device::F16>(p, a, stream); break;
    default: launch<n3::device::BF16>(p, a, stream);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("gated_rms_norm", TORCH_BOX(&gated_rms_norm)); }
