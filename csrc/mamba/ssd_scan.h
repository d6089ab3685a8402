// ssd_scan: y_t = S_t C_t + D x_t with S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T per head, times silu(z_t), and the
// last S; ssd_scan.slots: the same on states kept in slots, with states written at chosen tokens as well.
// dt = clamp(softplus(dt + dt_bias), dt_min, dt_max). Every operand is read in place, whatever its strides.
#pragma once
#include <algorithm>
#include <limits>
#include <optional>

#include "../common/check.h"
#include "operands.h"

namespace n3::ssd_scan {

using mamba::Indices;
using mamba::Operand;
using mamba::OptionalTensor;

constexpr const char* op = "ssd_scan";

// Chunks begin at multiples of kChunk tokens from the start of a sequence, so that a prompt split at such a multiple,
// its state handed over in float32, has the bits of the whole. (The chunk_size argument is a hint and is not used.)
constexpr int64_t kChunk = 64;

struct Params {
  Operand x, z;                // strides: sequence, token, head, channel
  Operand B, C;                // sequence, token, group, state dimension
  Operand dt;                  // sequence, token, head
  Operand A, D, dt_bias;       // head; D also channel, 0 where it is one number per head
  Operand initial;             // slot, head, channel, state dimension; null: zeros
  Operand final;               // the same; without slots the launcher's to fill in: [sequences, ...], float32
  Indices state_indices;       // slot of sequence s, null: s; negative: padding, y = 0 and no slot is touched
  Operand has_initial;         // bool; null: every sequence starts from `initial`
  Indices cu_seqlens;          // null: every sequence has `length` tokens
  Indices checkpoint_tokens;   // number of a packed token, or s * length + t
  Indices checkpoint_indices;  // the slot of `final` that gets the state after that token; negative: none
  void* y;                     // contiguous, dtype of x; the launcher's to fill in
  int64_t y_row;               // elements from one token's y to the next one's
  int64_t sequences, tokens;   // tokens of all sequences; packed: padding behind the last one too
  int64_t length;              // tokens of one sequence; packed: 0
  int64_t slots, checkpoints;  // slots: 0 without them
  int64_t heads, groups, head_dim, d_state;
  float dt_min, dt_max;
  bool dt_softplus;
};

// Strides: sequence (0 when packed), token, and what a token has.
inline Operand tokens_operand(const OptionalTensor& t, bool packed) {
  Operand o = mamba::operand_of(t);
  if (t && packed) std::rotate(o.strides, o.strides + 3, o.strides + 4);
  return o;
}

inline void check_chunk_size(int64_t chunk_size) {
  N3_CHECK(op, chunk_size >= 1, "chunk_size must be at least 1, got ", chunk_size);
}

// All operands but states and indices; sequences were counted before, as in Python.
inline Params check_inputs(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                           const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                           const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_min,
                           std::optional<double> dt_max, const char* name = op) {
  Params p{};
  p.sequences = mamba::count_sequences(name, x, cu_seqlens, 4);
  mamba::check_operands(name, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max);
  const bool packed = cu_seqlens.has_value();
  p.length = packed ? 0 : x.size(1);
  p.tokens = packed ? x.size(0) : p.sequences * p.length;
  p.heads = x.size(-2), p.groups = B.size(-2), p.head_dim = x.size(-1), p.d_state = B.size(-1);
  p.x = tokens_operand(x, packed), p.z = tokens_operand(z, packed);
  p.B = tokens_operand(B, packed), p.C = tokens_operand(C, packed);
  p.dt = tokens_operand(dt, packed);
  p.A = mamba::operand_of(A), p.D = mamba::operand_of(D), p.dt_bias = mamba::operand_of(dt_bias);
  p.cu_seqlens = mamba::indices_of(cu_seqlens);
  p.y_row = p.heads * p.head_dim;
  p.dt_softplus = dt_softplus;
  p.dt_min = float(dt_min), p.dt_max = dt_max ? float(*dt_max) : std::numeric_limits<float>::infinity();
  return p;
}

// Checks one call, for CPU and CUDA alike; y and final are left to the launcher.
inline Params check(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                    const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                    const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens, int64_t chunk_size,
                    bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  Params p = check_inputs(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus, dt_min, dt_max);
  if (initial_states) {
    check_shape(op, "initial_states", *initial_states, {p.sequences, p.heads, p.head_dim, p.d_state});
    check_floating(op, "initial_states", initial_states->scalar_type());
  }
  check_chunk_size(chunk_size);
  mamba::check_on_device(op, "initial_states", initial_states, x);
  mamba::check_on_device(op, "cu_seqlens", cu_seqlens, x);
  p.initial = mamba::operand_of(initial_states);
  return p;
}

// The same for states in slots; y is left to the launcher.
inline Params check_slots(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                          const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                          const Tensor& state, const Tensor& state_indices, const OptionalTensor& has_initial,
                          const OptionalTensor& cu_seqlens, const OptionalTensor& checkpoint_tokens,
                          const OptionalTensor& checkpoint_indices, int64_t chunk_size, bool dt_softplus,
                          double dt_min, std::optional<double> dt_max) {
  Params p = check_inputs(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus, dt_min, dt_max);
  check_dim(op, "state", state, 4);
  check_shape(op, "state", state, {state.size(0), p.heads, p.head_dim, p.d_state});
  check_floating(op, "state", state.scalar_type());
  mamba::check_slots(op, state_indices, has_initial, p.sequences);
  mamba::check_checkpoints(op, checkpoint_tokens, checkpoint_indices);
  check_chunk_size(chunk_size);
  check_same_device(op, "state", state, "x", x);
  check_same_device(op, "state_indices", state_indices, "x", x);
  mamba::check_on_device(op, "has_initial", has_initial, x);
  mamba::check_on_device(op, "cu_seqlens", cu_seqlens, x);
  mamba::check_on_device(op, "checkpoint_tokens", checkpoint_tokens, x);
  mamba::check_on_device(op, "checkpoint_indices", checkpoint_indices, x);
  p.initial = p.final = mamba::operand_of(state);
  p.slots = state.size(0);
  p.state_indices = mamba::indices_of(state_indices);
  p.has_initial = mamba::operand_of(has_initial);
  p.checkpoints = checkpoint_tokens ? checkpoint_tokens->size(0) : 0;
  p.checkpoint_tokens = mamba::indices_of(checkpoint_tokens);
  p.checkpoint_indices = mamba::indices_of(checkpoint_indices);
  return p;
}

}  // namespace n3::ssd_scan
