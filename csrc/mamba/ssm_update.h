// ssm_update: S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t  for B running sequences.
//
// Per row (head h, channel p) of N floats, in this order for every token:
//
//   dt = clamp(softplus(dt + bias))     dA = exp(A dt)     u = dt * x
//   s = fma(dA, s, u * B)               y = sum s C        y = (y + D x) * silu(z)
//
// States are carried in float32 through the tokens of a call and rounded when they are written. Every state is read
// before any is written. A padding sequence (negative source) and tokens behind num_tokens have output zero.
#pragma once
#include <optional>
#include <string>

#include "operands.h"

namespace n3::ssm_update {

constexpr const char* op = "ssm_update";

using mamba::Indices;
using mamba::Operand;
using mamba::OptionalTensor;

// Where the states go.
enum class Destination { kSource, kLast, kEach };  // the slot read; destination(b); destination(b, t) after token t

struct Params {
  int64_t batch, tokens, heads, head_dim, groups, d_state, slots;
  Operand state;                // [slots, H, P, N]
  Operand state_scale;          // [slots, H, P] float32, for int8 and float8_e4m3fn states
  Operand x, z;                 // strides: b, t, h, p
  Operand dt;                   // strides: b, t, h
  Operand B, C;                 // strides: b, t, g, n
  Operand A, dt_bias;           // strides: h
  Operand D;                    // strides: h, p; the second is 0 for [H]
  Indices source;               // (b), or (b, num_accepted[b] - 1) where num_accepted is given with [B, K]
  int64_t source_cols;          // K; 0: source has one dimension
  Destination where;
  Indices destination;
  Indices num_accepted, num_tokens, parents;  // data null: not given
  const int64_t* seed;          // (seed, offset), seed_stride apart
  int64_t seed_stride;
  bool stochastic;              // never for float32 states, whose rounding is exact
  bool dt_softplus;
  float dt_min, dt_max;         // infinity: no upper limit
  void* y;                      // shape and dtype of x, contiguous
};

inline bool is_scaled(ScalarType state) { return state == ScalarType::Char || state == ScalarType::Float8_e4m3fn; }

inline void check_state_dtype(const char* op, const char* name, const Tensor& state) {
  const ScalarType t = state.scalar_type();
  N3_CHECK(op, is_floating(t) || is_scaled(t), name,
           " must be float32, float16, bfloat16, int8 or float8_e4m3fn, got ", dtype_name(t));
}

// Checks one call, for CPU and CUDA alike (values of indices on the CPU only, by check_values in ssm_update_cpu.cpp);
// returns the problem, everything filled in but y.
inline Params check(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                    const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                    const OptionalTensor& state_indices, const OptionalTensor& dst_state_indices,
                    const OptionalTensor& num_accepted, const OptionalTensor& num_tokens,
                    const OptionalTensor& parents, const OptionalTensor& state_scale, const OptionalTensor& seed,
                    const std::string& rounding, bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  mamba::check_dim_of(op, "x", x, 3, 4);
  mamba::check_operands(op, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max);
  check_dim(op, "state", state, 4);
  Params p{};
  p.batch = x.size(0), p.tokens = x.dim() == 3 ? 1 : x.size(1), p.heads = x.size(-2), p.head_dim = x.size(-1);
  p.groups = B.size(-2), p.d_state = B.size(-1), p.slots = state.size(0);
  check_shape(op, "state", state, {p.slots, p.heads, p.head_dim, p.d_state});
  check_state_dtype(op, "state", state);
  mamba::check_indices(op, p.batch, p.tokens, "state", p.slots, state_indices, dst_state_indices, num_accepted);
  mamba::check_drafts(op, p.batch, p.tokens, dst_state_indices, num_accepted, num_tokens, parents);
  mamba::check_accepted_slots(op, state_indices, num_accepted);
  mamba::check_rounding(op, state, state_scale, seed, rounding);
  mamba::check_on_device(op, "state", state, x);
  mamba::check_on_device(op, "state_indices", state_indices, x);
  mamba::check_on_device(op, "dst_state_indices", dst_state_indices, x);
  mamba::check_on_device(op, "num_accepted", num_accepted, x);
  mamba::check_on_device(op, "num_tokens", num_tokens, x);
  mamba::check_on_device(op, "parents", parents, x);
  mamba::check_on_device(op, "state_scale", state_scale, x);
  mamba::check_on_device(op, "seed", seed, x);

  p.state = mamba::operand_of(state), p.state_scale = mamba::operand_of(state_scale);
  p.x = mamba::per_token_operand(x, 2), p.z = mamba::per_token_operand(z, 2);
  p.dt = mamba::per_token_operand(dt, 1);
  p.B = mamba::per_token_operand(B, 2), p.C = mamba::per_token_operand(C, 2);
  p.A = mamba::operand_of(A), p.dt_bias = mamba::operand_of(dt_bias), p.D = mamba::operand_of(D);
  p.source = mamba::indices_of(state_indices);
  p.source_cols = state_indices && state_indices->dim() == 2 ? state_indices->size(1) : 0;
  p.where = !dst_state_indices ? Destination::kSource
            : dst_state_indices->dim() == 1 ? Destination::kLast : Destination::kEach;
  p.destination = mamba::indices_of(dst_state_indices);
  p.num_accepted = mamba::indices_of(num_accepted), p.num_tokens = mamba::indices_of(num_tokens);
  p.parents = mamba::indices_of(parents);
  p.seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
  p.seed_stride = seed ? seed->stride(0) : 0;
  p.stochastic = rounding == "stochastic" && state.scalar_type() != ScalarType::Float;
  p.dt_softplus = dt_softplus, p.dt_min = float(dt_min), p.dt_max = dt_max ? float(*dt_max) : __builtin_inff();
  return p;
}

}  // namespace n3::ssm_update
