// ssm_replay_*: decoding from an older state H0 and a ring of the tokens since. Slot s keeps of token
// (start + i) mod R, i < count, what it adds to the state: x, B and dt (after softplus and limits); then
//
//   y_t = C_t (decay H0) + sum over committed i: decay_i dt_i (C_t . B_i) x_i + sum over own j <= t: the same
//
// with decays of sums of A dt. The state is written once in about R - 2T tokens, and a rejected draft token is one that
// was never counted. A fold is due when count + 2T > R; update, which folds, and commit, which counts, decide it by the
// same rule, so that nothing needs to pass between them.
#pragma once
#include <optional>

#include "operands.h"

namespace n3::ssm_replay {

using mamba::Indices;
using mamba::Operand;
using mamba::OptionalTensor;

// The ring of every slot.
struct Ring {
  int64_t slots, size;          // size: R
  Operand x, B, dt;             // [slots, R, H, P], [slots, R, G, N], [slots, R, H] float32
  Operand pos;                  // [slots, 2] int32: start, count
};

inline bool fold_is_due(int64_t count, int64_t tokens, int64_t ring_size) { return count + 2 * tokens > ring_size; }

// ---- update

struct UpdateParams {
  int64_t batch, tokens, heads, head_dim, groups, d_state, slots;
  Operand state;                // [slots, H, P, N]
  Ring ring;
  Operand x, z;                 // strides: b, t, h, p
  Operand dt;                   // strides: b, t, h
  Operand B, C;                 // strides: b, t, g, n
  Operand A, dt_bias;           // strides: h
  Operand D;                    // strides: h, p; the second is 0 for [H]
  Indices source;               // (b)
  Indices parents;              // (b, t); data null: a chain
  bool dt_softplus;
  float dt_min, dt_max;         // infinity: no upper limit
  void* y;                      // shape and dtype of x, contiguous
};

inline Ring check_ring(const char* op, int64_t slots, int64_t size, int64_t heads, int64_t head_dim, int64_t groups,
                       int64_t d_state, ScalarType dtype, const Tensor& ring_x, const Tensor& ring_B,
                       const Tensor& ring_dt, const Tensor& ring_pos, const char* of) {
  const auto check_entry_dtype = [&](const char* name, const Tensor& t) {
    N3_CHECK(op, t.scalar_type() == dtype, name, " must have the dtype of ", of, " (", dtype_name(dtype), "), got ",
             dtype_name(t.scalar_type()));
  };
  check_shape(op, "ring_x", ring_x, {slots, size, heads, head_dim});
  check_entry_dtype("ring_x", ring_x);
  check_shape(op, "ring_B", ring_B, {slots, size, groups, d_state});
  check_entry_dtype("ring_B", ring_B);
  check_shape(op, "ring_dt", ring_dt, {slots, size, heads});
  check_dtype(op, "ring_dt", ring_dt, ScalarType::Float);
  check_shape(op, "ring_pos", ring_pos, {slots, 2});
  check_dtype(op, "ring_pos", ring_pos, ScalarType::Int);
  return {slots, size, mamba::operand_of(ring_x), mamba::operand_of(ring_B), mamba::operand_of(ring_dt),
          mamba::operand_of(ring_pos)};
}

inline UpdateParams check_update(const Tensor& state, const Tensor& ring_x, const Tensor& ring_B,
                                 const Tensor& ring_dt, const Tensor& ring_pos, const Tensor& x, const Tensor& dt,
                                 const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                 const OptionalTensor& z, const OptionalTensor& dt_bias,
                                 const OptionalTensor& state_indices, const OptionalTensor& parents, bool dt_softplus,
                                 double dt_min, std::optional<double> dt_max) {
  constexpr const char* op = "ssm_replay_update";
  mamba::check_dim_of(op, "x", x, 3, 4);
  mamba::check_operands(op, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max);
  check_dim(op, "state", state, 4);
  UpdateParams p{};
  p.batch = x.size(0), p.tokens = x.dim() == 3 ? 1 : x.size(1), p.heads = x.size(-2), p.head_dim = x.size(-1);
  p.groups = B.size(-2), p.d_state = B.size(-1), p.slots = state.size(0);
  check_shape(op, "state", state, {p.slots, p.heads, p.head_dim, p.d_state});
  check_floating(op, "state", state.scalar_type());
  check_dim(op, "ring_x", ring_x, 4);
  const int64_t size = ring_x.size(1);
  p.ring = check_ring(op, p.slots, size, p.heads, p.head_dim, p.groups, p.d_state, x.scalar_type(), ring_x, ring_B,
                      ring_dt, ring_pos, "x");
  N3_CHECK(op, size >= 2 * p.tokens, "ring_x must hold at least 2 T = ", 2 * p.tokens, " tokens, got ", size);
  mamba::check_indices(op, p.batch, p.tokens, "state", p.slots, state_indices, {}, {});
  if (parents) {
    check_shape(op, "parents", *parents, {p.batch, p.tokens});
    check_dtype(op, "parents", *parents, ScalarType::Int);
  }
  mamba::check_on_device(op, "state", state, x);
  mamba::check_on_device(op, "ring_x", ring_x, x);
  mamba::check_on_device(op, "ring_B", ring_B, x);
  mamba::check_on_device(op, "ring_dt", ring_dt, x);
  mamba::check_on_device(op, "ring_pos", ring_pos, x);
  mamba::check_on_device(op, "state_indices", state_indices, x);
  mamba::check_on_device(op, "parents", parents, x);

  p.state = mamba::operand_of(state);
  p.x = mamba::per_token_operand(x, 2), p.z = mamba::per_token_operand(z, 2);
  p.dt = mamba::per_token_operand(dt, 1);
  p.B = mamba::per_token_operand(B, 2), p.C = mamba::per_token_operand(C, 2);
  p.A = mamba::operand_of(A), p.dt_bias = mamba::operand_of(dt_bias), p.D = mamba::operand_of(D);
  p.source = mamba::indices_of(state_indices), p.parents = mamba::indices_of(parents);
  p.dt_softplus = dt_softplus, p.dt_min = float(dt_min), p.dt_max = dt_max ? float(*dt_max) : __builtin_inff();
  return p;
}

// ---- commit

struct CommitParams {
  int64_t batch, tokens, heads, head_dim, groups, d_state;
  Ring ring;
  Indices num_accepted;         // (b)
  Indices path;                 // (b, t); data null: a chain
  Indices source;               // (b)
};

inline CommitParams check_commit(const Tensor& ring_pos, const Tensor& ring_x, const Tensor& ring_B,
                                 const Tensor& ring_dt, const Tensor& num_accepted, int64_t tokens,
                                 const OptionalTensor& path, const OptionalTensor& state_indices) {
  constexpr const char* op = "ssm_replay_commit";
  check_dim(op, "ring_pos", ring_pos, 2);
  check_floating(op, "ring_x", ring_x.scalar_type());
  check_dim(op, "ring_x", ring_x, 4);
  check_dim(op, "ring_B", ring_B, 4);
  CommitParams p{};
  const int64_t slots = ring_pos.size(0), size = ring_x.size(1);
  p.tokens = tokens, p.heads = ring_x.size(2), p.head_dim = ring_x.size(3);
  p.groups = ring_B.size(2), p.d_state = ring_B.size(3);
  p.ring = check_ring(op, slots, size, p.heads, p.head_dim, p.groups, p.d_state, ring_x.scalar_type(), ring_x, ring_B,
                      ring_dt, ring_pos, "ring_x");
  check_dim(op, "num_accepted", num_accepted, 1);
  check_dtype(op, "num_accepted", num_accepted, ScalarType::Int);
  p.batch = num_accepted.size(0);
  N3_CHECK(op, tokens >= 1 && tokens <= size / 2, "tokens must be between 1 and ", size / 2, ", got ", tokens);
  if (path) {
    check_shape(op, "path", *path, {p.batch, tokens});
    check_dtype(op, "path", *path, ScalarType::Int);
  }
  mamba::check_indices(op, p.batch, tokens, "ring_pos", slots, state_indices, {}, {});
  const auto check_device = [&](const char* name, const OptionalTensor& t) {
    if (t) check_same_device(op, name, *t, "ring_pos", ring_pos);
  };
  check_device("ring_x", ring_x), check_device("ring_B", ring_B), check_device("ring_dt", ring_dt);
  check_device("num_accepted", num_accepted), check_device("path", path), check_device("state_indices", state_indices);
  p.num_accepted = mamba::indices_of(num_accepted), p.path = mamba::indices_of(path);
  p.source = mamba::indices_of(state_indices);
  return p;
}

// ---- flush

struct FlushParams {
  int64_t batch, heads, head_dim, groups, d_state, slots;  // batch: how many slots
  Operand state;                // [slots, H, P, N]
  Ring ring;
  Operand A;
  Indices source;               // (b); data null: slot b
};

inline FlushParams check_flush(const Tensor& state, const Tensor& ring_pos, const Tensor& ring_x, const Tensor& ring_B,
                               const Tensor& ring_dt, const Tensor& A, const OptionalTensor& state_indices) {
  constexpr const char* op = "ssm_replay_flush";
  check_dim(op, "state", state, 4);
  check_floating(op, "state", state.scalar_type());
  check_floating(op, "ring_x", ring_x.scalar_type());
  check_dim(op, "ring_B", ring_B, 4);
  check_dim(op, "ring_x", ring_x, 4);
  FlushParams p{};
  p.slots = state.size(0), p.heads = state.size(1), p.head_dim = state.size(2), p.d_state = state.size(3);
  p.groups = ring_B.size(2);
  p.ring = check_ring(op, p.slots, ring_x.size(1), p.heads, p.head_dim, p.groups, p.d_state, ring_x.scalar_type(),
                      ring_x, ring_B, ring_dt, ring_pos, "ring_x");
  N3_CHECK(op, p.groups > 0 && p.heads % p.groups == 0, "groups of ring_B must divide the ", p.heads,
           " heads of state, got ", p.groups);
  check_shape(op, "A", A, {p.heads});
  check_floating(op, "A", A.scalar_type());
  p.batch = p.slots;
  if (state_indices) {
    check_dim(op, "state_indices", *state_indices, 1);
    mamba::check_index_dtype(op, "state_indices", *state_indices);
    p.batch = state_indices->size(0);
  }
  const auto check_device = [&](const char* name, const OptionalTensor& t) {
    if (t) check_same_device(op, name, *t, "state", state);
  };
  check_device("ring_pos", ring_pos), check_device("ring_x", ring_x), check_device("ring_B", ring_B);
  check_device("ring_dt", ring_dt), check_device("A", A), check_device("state_indices", state_indices);
  p.state = mamba::operand_of(state), p.A = mamba::operand_of(A), p.source = mamba::indices_of(state_indices);
  return p;
}

}  // namespace n3::ssm_replay
