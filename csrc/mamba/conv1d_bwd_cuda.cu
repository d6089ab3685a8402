#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "conv1d_bwd_kernel.cuh"
#include "conv1d_cuda.h"
#include "partial_sums_cuda.h"

namespace n3::causal_conv1d {
namespace {

bool in_rows(const Operand& o, int64_t bytes) {
  return o.strides[2] == 1 && o.strides[0] % kBackwardVector == 0 && o.strides[1] % kBackwardVector == 0 &&
         reinterpret_cast<uintptr_t>(o.data) % (kBackwardVector * bytes) == 0;
}

template <typename T, int kVector>
auto kernel_for(int64_t width) {
  switch (width) {
    case 1: return backward_kernel<T, kVector, 1>;
    case 2: return backward_kernel<T, kVector, 2>;
    case 3: return backward_kernel<T, kVector, 3>;
    case 4: return backward_kernel<T, kVector, 4>;
    default: return backward_kernel<T, 1, 0>;
  }
}

template <typename T>
void launch(const BackwardParams& b, BackwardArgs a, const Tensor& like, cudaStream_t stream) {
  const Params& p = b.forward;
  const bool vectors = p.taps.width <= kFewTaps && p.taps.channels % kBackwardVector == 0 &&
                       in_rows(p.x, sizeof(T)) && in_rows(b.grad_y, sizeof(T));
  const BackwardPlan plan = backward_plan(p.tokens, b.d_initial && p.kept ? p.sequences : 0, p.taps.channels,
                                          vectors ? kBackwardVector : 1);
  const int64_t rows = p.taps.width + 1;
  const Tensor partial = torch::stable::new_empty(
      like, std::vector<int64_t>{plan.pieces.count * rows * p.taps.channels}, ScalarType::Float);
  a.partial = static_cast<float*>(partial.mutable_data_ptr());
  a.tokens_each = plan.pieces.each;
  a.forward.tiles = uint32_t(plan.pieces.count), a.forward.channel_blocks = uint32_t(plan.channel_blocks);
  if (plan.blocks > 0) {  // a grid of 0 blocks is a launch error
    mamba::check_grid(bwd_op, plan.blocks);
    const auto kernel = vectors ? kernel_for<T, kBackwardVector>(p.taps.width) : kernel_for<T, 1>(p.taps.width);
    kernel<<<uint32_t(plan.blocks), kThreads, 0, stream>>>(a);
    N3_CUDA_CHECK(bwd_op, cudaGetLastError());
  }
  const mamba::View dweight{b.dweight, mamba::type_of(p.taps.weight.dtype), {1}};
  const mamba::View dbias{b.dbias, mamba::type_of(p.taps.bias.dtype), {1}};
  mamba::launch_sums(bwd_op, {a.partial, plan.pieces.count, rows, p.taps.width, p.taps.channels, dweight, dbias},
                     stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const OptionalTensor& grad_final_state,
                                                    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const OptionalTensor& initial_state,
                                                    const OptionalTensor& cu_seqlens,
                                                    const std::optional<std::string>& activation) {
  BackwardParams b = check_bwd(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(bwd_op, x);
  const auto like = [&](const OptionalTensor& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(x, {0});
  };
  const Tensor dx = like(x), dweight = like(weight), dbias = like(bias), d_initial = like(initial_state);
  b.dx = dx.mutable_data_ptr(), b.dweight = dweight.mutable_data_ptr();
  b.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  b.d_initial = initial_state && initial_state->numel() ? d_initial.mutable_data_ptr() : nullptr;
  BackwardArgs a{};
  a.forward = args_of(b.forward);
  a.grad_y = mamba::view_of(b.grad_y), a.grad_final = mamba::view_of(b.grad_final);
  a.dx = b.dx, a.d_initial = b.d_initial;
  switch (x.scalar_type()) {  // check_bwd() let nothing else through
    case ScalarType::Float: launch<float>(b, a, x, stream); break;
    case ScalarType::Half: launch<mamba::F16>(b, a, x, stream); break;
    default: launch<mamba::BF16>(b, a, x, stream);
  }
  return {dx, dweight, dbias, d_initial};
}

}  // namespace
}  // namespace n3::causal_conv1d

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("causal_conv1d_bwd", TORCH_BOX(&n3::causal_conv1d::backward)); }
