#include "conv1d.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "conv1d_kernel.cuh"
#include "operands_cuda.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace conv = n3::causal_conv1d;
namespace mamba = n3::mamba;
using mamba::OptionalTensor;

conv::Args args_of(const conv::Params& p) {
  conv::Args a{};
  a.x = mamba::view_of(p.x);
  a.taps = {mamba::view_of(p.taps.weight), mamba::view_of(p.taps.bias), p.taps.channels, p.taps.width, p.taps.silu};
  a.initial = mamba::view_of(p.initial), a.final = mamba::view_of(p.final);
  a.state_indices = mamba::view_of(p.state_indices), a.has_initial = mamba::view_of(p.has_initial);
  a.cu_seqlens = mamba::view_of(p.cu_seqlens);
  a.checkpoint_tokens = mamba::view_of(p.checkpoint_tokens);
  a.checkpoint_indices = mamba::view_of(p.checkpoint_indices);
  a.y = p.y;
  a.sequences = p.sequences, a.tokens = p.tokens, a.length = p.length, a.kept = p.kept, a.slots = p.slots;
  a.checkpoints = p.checkpoints;
  return a;
}

bool in_vectors(const conv::Params& p, int64_t vector) {
  return p.x.strides[2] == 1 && p.x.strides[0] % vector == 0 && p.x.strides[1] % vector == 0 &&
         p.taps.channels % vector == 0 && reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0;
}

template <typename T>
void launch(const conv::Params& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  conv::Args a = args_of(p);
  const bool few = p.taps.width <= conv::kFewTaps, vectors = few && in_vectors(p, kVector);
  const bool in_slots = p.state_indices.data != nullptr;
  const int64_t states = p.checkpoints + (in_slots ? 0 : p.sequences);
  const conv::Plan plan = conv::plan(p.tokens, p.kept ? states : 0, p.taps.channels, vectors ? kVector : 1);
  a.tiles = plan.tiles, a.channel_blocks = plan.channel_blocks;
  if (plan.blocks > 0) {  // a grid of 0 blocks is a launch error
    const auto kernel = vectors ? conv::forward_kernel<T, kVector, true>
                        : few   ? conv::forward_kernel<T, 1, true>
                                : conv::forward_kernel<T, 1, false>;
    kernel<<<uint32_t(plan.blocks), conv::kThreads, 0, stream>>>(a);
    N3_CUDA_CHECK(conv::op, cudaGetLastError());
  }
  a.channel_blocks = conv::ceil_div(p.taps.channels, conv::kThreads);
  if (in_slots && p.kept && p.sequences * a.channel_blocks > 0) {
    conv::final_kernel<T><<<uint32_t(p.sequences * a.channel_blocks), conv::kThreads, 0, stream>>>(a);
    N3_CUDA_CHECK(conv::op, cudaGetLastError());
  }
}

Tensor run(conv::Params& p, const Tensor& x) {
  const Tensor y =
      torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  p.y = y.mutable_data_ptr();
  const cudaStream_t stream = n3::current_stream(conv::op, x);
  switch (x.scalar_type()) {  // check() let nothing else through
    case ScalarType::Float: launch<float>(p, stream); break;
    case ScalarType::Half: launch<mamba::F16>(p, stream); break;
    default: launch<mamba::BF16>(p, stream);
  }
  return y;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         const std::optional<std::string>& activation) {
  conv::Params p = conv::check(x, weight, bias, initial_state, cu_seqlens, activation);
  const n3::DeviceGuard guard(x.get_device_index());
  const Tensor final_state =
      torch::stable::new_empty(x, std::vector<int64_t>{p.sequences, p.taps.channels, p.kept}, x.scalar_type());
  p.final = mamba::operand_of(final_state);
  return {run(p, x), final_state};
}

Tensor causal_conv1d_slots(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& conv_state,
                           const Tensor& state_indices, const OptionalTensor& has_initial,
                           const OptionalTensor& cu_seqlens, const OptionalTensor& checkpoint_tokens,
                           const OptionalTensor& checkpoint_indices, const std::optional<std::string>& activation) {
  conv::Params p = conv::check_slots(x, weight, bias, conv_state, state_indices, has_initial, cu_seqlens,
                                     checkpoint_tokens, checkpoint_indices, activation);
  const n3::DeviceGuard guard(x.get_device_index());
  return run(p, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d.slots", TORCH_BOX(&causal_conv1d_slots));
}
