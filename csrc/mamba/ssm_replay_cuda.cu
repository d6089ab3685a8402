#include "ssm_replay.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "ssm_replay_kernel.cuh"
#include "ssm_update_cuda.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace mamba = n3::mamba;
namespace replay = n3::ssm_replay;
namespace update = n3::ssm_update;
using mamba::OptionalTensor;

replay::RingView view_of(const replay::Ring& r) {
  replay::RingView v{mamba::view_of(r.x), mamba::view_of(r.B), mamba::view_of(r.dt), mamba::View{}, r.size};
  v.pos = {r.pos.data, mamba::Type::kFloat, {r.pos.strides[0], r.pos.strides[1], 0, 0}};  // int32
  return v;
}

template <typename State, typename RowT, bool kTree>
void launch_rows(const char* op, const replay::Args& a, const update::Plan& plan, cudaStream_t stream) {
  mamba::check_grid(op, plan.blocks);
  replay::replay_kernel<State, RowT, kTree><<<uint32_t(plan.blocks), update::kThreads, 0, stream>>>(a);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

template <typename State>
void launch(const char* op, replay::Args a, cudaStream_t stream) {
  const update::Plan p = update::plan(a.ssm.slots.batch, a.ssm.heads, a.ssm.head_dim, a.ssm.d_state, a.ssm.vectors);
  if (p.blocks == 0) return;  // a grid of 0 blocks is a launch error
  a.ssm.tiles = p.tiles;
  const bool tree = a.ssm.slots.parents.data;
  if (!p.shape.vectors) return launch_rows<State, mamba::Row<32, 8, false>, true>(op, a, p, stream);  // a chain too
  if (p.shape.lanes == 16) {
    return tree ? launch_rows<State, mamba::Row<16, 4, true>, true>(op, a, p, stream)
                : launch_rows<State, mamba::Row<16, 4, true>, false>(op, a, p, stream);
  }
  return tree ? launch_rows<State, mamba::Row<8, 4, true>, true>(op, a, p, stream)
              : launch_rows<State, mamba::Row<8, 4, true>, false>(op, a, p, stream);
}

void launch_state(const char* op, const replay::Args& a, cudaStream_t stream) {
  switch (a.ssm.state.type) {  // checks let nothing else through
    case mamba::Type::kFloat: return launch<float>(op, a, stream);
    case mamba::Type::kHalf: return launch<mamba::F16>(op, a, stream);
    default: launch<mamba::BF16>(op, a, stream);
  }
}

void launch_position(const char* op, const replay::MoveArgs& a, cudaStream_t stream) {
  if (a.batch == 0) return;
  replay::position_kernel<replay::kMoveThreads>
      <<<uint32_t(replay::move_blocks(a.batch)), replay::kMoveThreads, 0, stream>>>(a);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

Tensor ssm_replay_update(const Tensor& state, const Tensor& ring_x, const Tensor& ring_B, const Tensor& ring_dt,
                         const Tensor& ring_pos, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                         const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                         const OptionalTensor& dt_bias, const OptionalTensor& state_indices,
                         const OptionalTensor& parents, bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  constexpr const char* op = "ssm_replay_update";
  const replay::UpdateParams p =
      replay::check_update(state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C, D, z, dt_bias, state_indices,
                           parents, dt_softplus, dt_min, dt_max);
  update::check_covered(op, "state", p.d_state);
  const n3::DeviceGuard guard(x.get_device_index());
  const Tensor y =
      torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  replay::Args a{};
  update::Args& s = a.ssm;
  s.state = mamba::view_of(p.state);
  s.x = mamba::view_of(p.x), s.z = mamba::view_of(p.z), s.B = mamba::view_of(p.B), s.C = mamba::view_of(p.C);
  s.D = mamba::view_of(p.D);
  s.y = mamba::contiguous_view(y.mutable_data_ptr(), x.scalar_type(), p.tokens, p.heads, p.head_dim);
  s.time = {mamba::view_of(p.dt), mamba::view_of(p.A), mamba::view_of(p.dt_bias), p.dt_softplus, p.dt_min, p.dt_max};
  s.slots.source = mamba::view_of(p.source), s.slots.parents = mamba::view_of(p.parents);
  s.slots.slots = p.slots, s.slots.batch = p.batch, s.slots.tokens = p.tokens;
  s.heads = p.heads, s.heads_per_group = p.heads / p.groups, s.head_dim = p.head_dim, s.d_state = p.d_state;
  s.vectors = update::in_vectors(p.state, p.d_state, update::state_bytes(p.state.dtype));
  a.ring = view_of(p.ring);
  launch_state(op, a, n3::current_stream(op, x));
  return y;
}

void ssm_replay_commit(const Tensor& ring_pos, const Tensor& ring_x, const Tensor& ring_B, const Tensor& ring_dt,
                       const Tensor& num_accepted, int64_t tokens, const OptionalTensor& path,
                       const OptionalTensor& state_indices) {
  constexpr const char* op = "ssm_replay_commit";
  const replay::CommitParams p =
      replay::check_commit(ring_pos, ring_x, ring_B, ring_dt, num_accepted, tokens, path, state_indices);
  const n3::DeviceGuard guard(ring_x.get_device_index());
  const cudaStream_t stream = n3::current_stream(op, ring_x);
  replay::MoveArgs a{view_of(p.ring), mamba::view_of(p.source), mamba::view_of(p.num_accepted), mamba::view_of(p.path),
                     p.batch, p.ring.slots, p.tokens, p.heads, p.head_dim, p.groups, p.d_state,
                     replay::move_blocks(p.heads * (p.head_dim + 1) + p.groups * p.d_state)};
  if (path && p.batch * a.blocks > 0) {
    mamba::check_grid(op, p.batch * a.blocks);
    replay::move_kernel<replay::kMoveThreads><<<uint32_t(p.batch * a.blocks), replay::kMoveThreads, 0, stream>>>(a);
    N3_CUDA_CHECK(op, cudaGetLastError());
  }
  launch_position(op, a, stream);
}

void ssm_replay_flush(const Tensor& state, const Tensor& ring_pos, const Tensor& ring_x, const Tensor& ring_B,
                      const Tensor& ring_dt, const Tensor& A, const OptionalTensor& state_indices) {
  constexpr const char* op = "ssm_replay_flush";
  const replay::FlushParams p =
      replay::check_flush(state, ring_pos, ring_x, ring_B, ring_dt, A, state_indices);
  update::check_covered(op, "state", p.d_state);
  const n3::DeviceGuard guard(state.get_device_index());
  const cudaStream_t stream = n3::current_stream(op, state);
  replay::Args a{};
  update::Args& s = a.ssm;
  s.state = mamba::view_of(p.state), s.time.A = mamba::view_of(p.A);
  s.slots.source = mamba::view_of(p.source), s.slots.slots = p.slots, s.slots.batch = p.batch;
  s.heads = p.heads, s.heads_per_group = p.heads / p.groups, s.head_dim = p.head_dim, s.d_state = p.d_state;
  s.vectors = update::in_vectors(p.state, p.d_state, update::state_bytes(p.state.dtype));
  a.ring = view_of(p.ring), a.flush = true;
  launch_state(op, a, stream);
  replay::MoveArgs m{};
  m.ring = a.ring, m.source = s.slots.source, m.batch = p.batch, m.slots = p.slots;
  launch_position(op, m, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("ssm_replay_update", TORCH_BOX(&ssm_replay_update));
  m.impl("ssm_replay_commit", TORCH_BOX(&ssm_replay_commit));
  m.impl("ssm_replay_flush", TORCH_BOX(&ssm_replay_flush));
}
