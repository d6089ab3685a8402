#include <vector>

#include <torch/csrc/stable/library.h>

#include "conv1d_update_cuda.h"

namespace n3::causal_conv1d {
namespace {

template <typename T>
void launch_typed(const char* op, const UpdateArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.slots.batch * a.channel_blocks;
  if (blocks == 0) return;  // a grid of 0 blocks is a launch error
  mamba::check_grid(op, blocks);
  update_kernel<T><<<uint32_t(blocks), kUpdateThreads, 0, stream>>>(a);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

}  // namespace

void launch_update(const char* op, const UpdateArgs& a, cudaStream_t stream) {
  switch (a.x.type) {  // checks let nothing else through
    case mamba::Type::kFloat: return launch_typed<float>(op, a, stream);
    case mamba::Type::kHalf: return launch_typed<mamba::F16>(op, a, stream);
    default: launch_typed<mamba::BF16>(op, a, stream);
  }
}

}  // namespace n3::causal_conv1d

namespace {

using n3::Tensor;
namespace conv = n3::causal_conv1d;
namespace mamba = n3::mamba;
using mamba::OptionalTensor;

Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& state_indices, const OptionalTensor& dst_state_indices,
                            const OptionalTensor& num_accepted, const OptionalTensor& num_tokens,
                            const OptionalTensor& parents, const OptionalTensor& cache_seqlens,
                            const std::optional<std::string>& activation) {
  const conv::UpdateParams p =
      conv::check_update(x, conv_state, weight, bias, state_indices, dst_state_indices, num_accepted, num_tokens,
                         parents, cache_seqlens, activation);
  const n3::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = n3::current_stream(conv::update_op, x);
  const Tensor y =
      torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  conv::UpdateArgs a = conv::args_of(p);
  a.y = mamba::contiguous_view(y.mutable_data_ptr(), x.scalar_type(), p.tokens, p.taps.channels);
  const int32_t bytes = x.scalar_type() == n3::ScalarType::Float ? 4 : 2;
  const mamba::Copies copies = mamba::stage(
      conv::update_op, a.slots, {mamba::source_of(p.state, p.taps.channels, p.kept, 1, bytes)}, x, stream);
  a.states = copies[0];
  conv::launch_update(conv::update_op, a, stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update)); }
