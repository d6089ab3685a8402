#include <vector>

#include <torch/csrc/stable/library.h>

#include "ssm_update_cuda.h"

namespace n3::ssm_update {
namespace {

template <typename State, typename RowT, bool kTree>
void launch_rows(const char* op, const Args& a, const Plan& plan, cudaStream_t stream) {
  update_kernel<State, RowT, kTree><<<uint32_t(plan.blocks), kThreads, 0, stream>>>(a);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

template <typename State>
void launch_state(const char* op, Args a, cudaStream_t stream) {
  const Plan p = plan(a.slots.batch, a.heads, a.head_dim, a.d_state, a.vectors);
  if (p.blocks == 0) return;  // a grid of 0 blocks is a launch error
  mamba::check_grid(op, p.blocks);
  a.tiles = p.tiles;
  const bool tree = a.slots.parents.data;
  if (!p.shape.vectors) return launch_rows<State, mamba::Row<32, 8, false>, true>(op, a, p, stream);  // a chain too
  if (p.shape.lanes == 16) {
    return tree ? launch_rows<State, mamba::Row<16, 4, true>, true>(op, a, p, stream)
                : launch_rows<State, mamba::Row<16, 4, true>, false>(op, a, p, stream);
  }
  return tree ? launch_rows<State, mamba::Row<8, 4, true>, true>(op, a, p, stream)
              : launch_rows<State, mamba::Row<8, 4, true>, false>(op, a, p, stream);
}

}  // namespace

void launch(const char* op, Args a, cudaStream_t stream) {
  switch (a.state.type) {  // checks let nothing else through
    case mamba::Type::kFloat: return launch_state<float>(op, a, stream);
    case mamba::Type::kHalf: return launch_state<mamba::F16>(op, a, stream);
    case mamba::Type::kBFloat16: return launch_state<mamba::BF16>(op, a, stream);
    case mamba::Type::kInt8: return launch_state<int8_t>(op, a, stream);
    default: launch_state<mamba::E4m3>(op, a, stream);
  }
}

}  // namespace n3::ssm_update

namespace {

using n3::Tensor;
namespace mamba = n3::mamba;
namespace update = n3::ssm_update;
using mamba::OptionalTensor;

Tensor ssm_update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                  const OptionalTensor& state_indices, const OptionalTensor& dst_state_indices,
                  const OptionalTensor& num_accepted, const OptionalTensor& num_tokens, const OptionalTensor& parents,
                  const OptionalTensor& state_scale, const OptionalTensor& seed, const std::string& rounding,
                  bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  const update::Params p =
      update::check(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dst_state_indices, num_accepted, num_tokens,
                    parents, state_scale, seed, rounding, dt_softplus, dt_min, dt_max);
  update::check_covered(update::op, "B", p.d_state);
  const n3::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = n3::current_stream(update::op, x);
  const Tensor y =
      torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  const int32_t bytes = update::state_bytes(state.scalar_type());

  update::Args a = update::args_of(p);
  a.y = mamba::contiguous_view(y.mutable_data_ptr(), x.scalar_type(), p.tokens, p.heads, p.head_dim);
  std::vector<mamba::Source> sources{mamba::source_of(p.state, p.heads, p.head_dim, p.d_state, bytes)};
  if (state_scale) sources.push_back(mamba::source_of(p.state_scale, p.heads, p.head_dim, 1, 4));
  const mamba::Copies copies = mamba::stage(update::op, a.slots, sources, x, stream);
  a.states = copies[0], a.scales = copies[1];
  update::launch(update::op, a, stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("ssm_update", TORCH_BOX(&ssm_update)); }
