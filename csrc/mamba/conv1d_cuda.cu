#include "conv1d_cuda.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/launch.h"

namespace n3::causal_conv1d {
namespace {

bool in_vectors(const Params& p, int64_t vector) {
  return p.x.strides[2] == 1 && p.x.strides[0] % vector == 0 && p.x.strides[1] % vector == 0 &&
         p.taps.channels % vector == 0 && reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0;
}

// y, checkpoints and, where they are not in slots, the final states.
template <typename T, typename Y>
void launch_forward(const char* op, const Params& p, bool overlaps, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool few = p.taps.width <= kFewTaps, vectors = few && in_vectors(p, kVector);
  const int64_t states = p.checkpoints + (p.state_indices.data ? 0 : p.sequences);
  const Plan grid = plan(p.tokens, p.kept ? states : 0, p.taps.channels, vectors ? kVector : 1);
  if (grid.blocks == 0) return;  // a grid of 0 blocks is a launch error
  mamba::check_grid(op, grid.blocks);
  Args a = args_of(p);
  a.tiles = uint32_t(grid.tiles), a.channel_blocks = uint32_t(grid.channel_blocks);
  const auto kernel = vectors ? forward_kernel<T, Y, kVector, true>
                      : few   ? forward_kernel<T, Y, 1, true>
                              : forward_kernel<T, Y, 1, false>;
  launch_overlapping(op, kernel, {grid.blocks, kThreads, 0, 1, overlaps}, stream, a);
}

template <typename T>
void launch(const Params& p, cudaStream_t stream) {
  launch_forward<T, T>(op, p, false, stream);
  if (!p.state_indices.data) return;
  Args a = args_of(p);
  const int64_t channel_blocks = ceil_div(p.taps.channels, kThreads), blocks = p.sequences * channel_blocks;
  if (!p.kept || blocks == 0) return;
  mamba::check_grid(op, blocks);
  a.channel_blocks = uint32_t(channel_blocks);
  final_kernel<T><<<uint32_t(blocks), kThreads, 0, stream>>>(a);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

}  // namespace

void launch_mixed(const char* op, const Params& p, cudaStream_t stream) {
  p.x.dtype == ScalarType::Half ? launch_forward<mamba::F16, mamba::Saturated>(op, p, true, stream)
                                : launch_forward<mamba::BF16, mamba::Saturated>(op, p, true, stream);
}

namespace {

Tensor run(Params& p, const Tensor& x) {
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  p.y = y.mutable_data_ptr();
  const cudaStream_t stream = current_stream(op, x);
  switch (p.x.dtype) {  // checks let nothing else through
    case ScalarType::Float: launch<float>(p, stream); break;
    case ScalarType::Half: launch<mamba::F16>(p, stream); break;
    default: launch<mamba::BF16>(p, stream);
  }
  return y;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         const std::optional<std::string>& activation) {
  Params p = check(x, weight, bias, initial_state, cu_seqlens, activation);
  const DeviceGuard guard(x.get_device_index());
  const Tensor final_state =
      torch::stable::new_empty(x, std::vector<int64_t>{p.sequences, p.taps.channels, p.kept}, x.scalar_type());
  p.final = mamba::operand_of(final_state);
  return {run(p, x), final_state};
}

Tensor causal_conv1d_slots(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& conv_state,
                           const Tensor& state_indices, const OptionalTensor& has_initial,
                           const OptionalTensor& cu_seqlens, const OptionalTensor& checkpoint_tokens,
                           const OptionalTensor& checkpoint_indices, const std::optional<std::string>& activation) {
  Params p = check_slots(x, weight, bias, conv_state, state_indices, has_initial, cu_seqlens, checkpoint_tokens,
                         checkpoint_indices, activation);
  const DeviceGuard guard(x.get_device_index());
  return run(p, x);
}

}  // namespace
}  // namespace n3::causal_conv1d

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&n3::causal_conv1d::causal_conv1d));
  m.impl("causal_conv1d.slots", TORCH_BOX(&n3::causal_conv1d::causal_conv1d_slots));
}
