// Launch of ssm_update's kernel, for the operator and for mamba2_decode.
#pragma once
#include "operands_cuda.h"
#include "ssm_update.h"
#include "ssm_update_kernel.cuh"

namespace n3::ssm_update {

inline bool in_vectors(const mamba::Operand& state, int64_t d_state, int64_t bytes) {
  for (int i = 0; i < 3; ++i) {
    if (state.strides[i] % 4) return false;
  }
  return state.strides[3] == 1 && d_state % 4 == 0 && reinterpret_cast<uintptr_t>(state.data) % (4 * bytes) == 0;
}

inline void check_covered(const char* op, const char* name, int64_t d_state) {
  N3_CHECK(op, d_state <= kMaxState, name, " must have at most ", kMaxState,
           " values per row for the CUDA kernel, got ", d_state);
}

inline int32_t state_bytes(ScalarType t) {
  return t == ScalarType::Float ? 4 : t == ScalarType::Half || t == ScalarType::BFloat16 ? 2 : 1;
}

// Everything but y and the staged states.
inline Args args_of(const Params& p) {
  Args a{};
  a.state = mamba::view_of(p.state), a.scale = mamba::view_of(p.state_scale);
  a.x = mamba::view_of(p.x), a.z = mamba::view_of(p.z), a.B = mamba::view_of(p.B), a.C = mamba::view_of(p.C);
  a.D = mamba::view_of(p.D);
  a.time = {mamba::view_of(p.dt), mamba::view_of(p.A), mamba::view_of(p.dt_bias), p.dt_softplus, p.dt_min, p.dt_max};
  a.slots = {mamba::view_of(p.source), p.source_cols, mamba::Where(p.where), mamba::view_of(p.destination),
             mamba::view_of(p.num_accepted), mamba::view_of(p.num_tokens), mamba::view_of(p.parents), p.slots, p.batch,
             p.tokens};
  a.rounding = {p.stochastic ? p.seed : nullptr, p.seed_stride};
  a.heads = p.heads, a.heads_per_group = p.heads / p.groups, a.head_dim = p.head_dim, a.d_state = p.d_state;
  a.vectors = in_vectors(p.state, p.d_state, state_bytes(p.state.dtype));
  return a;
}

// `a.tiles` is filled in here. Compiled once, in ssm_update_cuda.cu.
void launch(const char* op, Args a, cudaStream_t stream);

}  // namespace n3::ssm_update
