#include "gated_norm_cuda.h"

#include <torch/csrc/stable/library.h>

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace norm = n3::gated_norm;
namespace mamba = n3::mamba;

template <typename T, bool kVectors>
void launch_vectors(const norm::Args& a, cudaStream_t stream) {
  const norm::Plan plan = norm::plan(a.rows, a.groups, a.group_size);
  if (plan.blocks == 0) return;  // a grid of 0 blocks is a launch error
  mamba::check_grid(norm::op, plan.blocks);
  norm::check_groups(norm::op, a.rows * a.groups);
  const auto kernel = plan.threads == 32    ? norm::forward_kernel<T, 32, kVectors>
                      : plan.threads == 128 ? norm::forward_kernel<T, 128, kVectors>
                                            : norm::forward_kernel<T, 512, kVectors>;
  kernel<<<uint32_t(plan.blocks), norm::block_threads(plan.threads), 0, stream>>>(a);
  N3_CUDA_CHECK(norm::op, cudaGetLastError());
}

template <typename T>
void launch(const norm::Params& p, const norm::Args& a, cudaStream_t stream) {
  norm::in_vectors(p) ? launch_vectors<T, true>(a, stream) : launch_vectors<T, false>(a, stream);
}

Tensor gated_rms_norm(const Tensor& x, const mamba::OptionalTensor& z, const Tensor& weight, int64_t group_size,
                      double eps, bool norm_before_gate) {
  norm::Params p = norm::check(x, z, weight, group_size, eps, norm_before_gate);
  const n3::DeviceGuard guard(x.get_device_index());
  Tensor x_room, z_room;
  p.x = norm::rows_in(x, x_room);
  if (z) p.z = norm::rows_in(*z, z_room);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  norm::Args a = norm::args_of(p);
  a.y = y.mutable_data_ptr();
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
