#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "gated_norm_bwd_kernel.cuh"
#include "gated_norm_cuda.h"
#include "partial_sums_cuda.h"

namespace n3::gated_norm {
namespace {

using mamba::OptionalTensor;

template <typename T, bool kVectors>
void launch_vectors(const BackwardArgs& b, const BackwardPlan& plan, cudaStream_t stream) {
  const auto kernel = plan.threads == 64    ? backward_kernel<T, 64, kVectors>
                      : plan.threads == 256 ? backward_kernel<T, 256, kVectors>
                                            : backward_kernel<T, 512, kVectors>;
  kernel<<<uint32_t(plan.blocks), plan.threads, plan.shared, stream>>>(b);
  N3_CUDA_CHECK(bwd_op, cudaGetLastError());
}

template <typename T>
void launch(const BackwardParams& b, const BackwardArgs& a, const BackwardPlan& plan, cudaStream_t stream) {
  if (plan.blocks == 0) return;  // a grid of 0 blocks is a launch error
  mamba::check_grid(bwd_op, plan.blocks);
  in_vectors(b.forward) && aligned_rows(b.grad_y, b.grad_y.strides[0], b.grad_y.strides[1])
      ? launch_vectors<T, true>(a, plan, stream)
      : launch_vectors<T, false>(a, plan, stream);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const OptionalTensor& z,
                                            const Tensor& weight, int64_t group_size, double eps,
                                            bool norm_before_gate) {
  BackwardParams b = check_bwd(grad_y, x, z, weight, group_size, eps, norm_before_gate);
  Params& p = b.forward;
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(bwd_op, x);
  Tensor rooms[3];
  p.x = rows_in(x, rooms[0]), b.grad_y = rows_in(grad_y, rooms[1]);
  if (z) p.z = rows_in(*z, rooms[2]);
  const Tensor dx = torch::stable::new_empty(x, x.sizes());
  const Tensor dz = z ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  const Tensor dweight = torch::stable::new_empty(weight, {p.dim});
  const int64_t groups = p.dim ? p.dim / p.group_size : 0;
  const BackwardPlan plan = backward_plan(p.rows, groups, p.group_size);
  const Tensor partial = torch::stable::new_empty(x, std::vector<int64_t>{plan.pieces.count * p.dim}, ScalarType::Float);
  float* sums = static_cast<float*>(partial.mutable_data_ptr());
  const BackwardArgs a{args_of(p), mamba::view_of(b.grad_y), dx.mutable_data_ptr(),
                       z ? dz.mutable_data_ptr() : nullptr, sums, plan.pieces.each, plan.held};
  switch (x.scalar_type()) {  // check_bwd() let nothing else through
    case ScalarType::Float: launch<float>(b, a, plan, stream); break;
    case ScalarType::Half: launch<mamba::F16>(b, a, plan, stream); break;
    default: launch<mamba::BF16>(b, a, plan, stream);
  }
  const mamba::View to{dweight.mutable_data_ptr(), mamba::type_of(weight.scalar_type()), {1}};
  mamba::launch_sums(bwd_op, {sums, plan.pieces.count, 1, 1, p.dim, to, {}}, stream);
  return {dx, dz, dweight};
}

}  // namespace
}  // namespace n3::gated_norm

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("gated_rms_norm_bwd", TORCH_BOX(&n3::gated_norm::backward)); }
