// causal_conv1d: y_t = act(bias + sum_k weight[:, k] * x_{t-W+1+k}) per channel, for prompts (batched or packed, states
// as tensors or in slots), its backward, and causal_conv1d_update for the next tokens of running sequences.
//
// In float32: acc = bias, then acc = fma(weight[k], x_{t-W+1+k}, acc) for k = 0 .. W-1, then the activation, rounded
// once. Before a sequence's first token stand the W - 1 newest inputs of its state. States are raw inputs, copied.
#pragma once
#include <optional>
#include <string>

#include "operands.h"

namespace n3::causal_conv1d {

using mamba::Indices;
using mamba::Operand;
using mamba::OptionalTensor;

constexpr const char* op = "causal_conv1d";
constexpr const char* bwd_op = "causal_conv1d_bwd";
constexpr const char* update_op = "causal_conv1d_update";

// What every form has.
struct Taps {
  Operand weight;  // strides: channel, tap
  Operand bias;    // stride: channel; data null: none
  int64_t channels, width;
  bool silu;
};

// causal_conv1d and causal_conv1d.slots.
struct Params {
  Operand x;                   // strides: sequence (0 where packed), token, channel
  Taps taps;
  Operand initial;             // [slots, C, S]: slot, channel, input, oldest first; data null: zeros
  Operand final;               // the same; without slots the launcher's to fill in: [sequences, C, S]
  Indices state_indices;       // slot of sequence s, null: s; negative: padding, y = 0 and no slot is touched
  Operand has_initial;         // bool; null: every sequence starts from `initial`
  Indices cu_seqlens;          // null: every sequence has `length` tokens
  Indices checkpoint_tokens;   // number of a packed token, or s * length + t
  Indices checkpoint_indices;  // the slot of `final` that gets the state after that token; negative: none
  void* y;                     // contiguous, shape and dtype of x; the launcher's to fill in
  int64_t sequences, tokens;   // tokens of all sequences; packed: padding behind the last one too
  int64_t length;              // tokens of one sequence; packed: 0
  int64_t kept;                // S, the inputs in a state: at least width - 1
  int64_t slots, checkpoints;  // slots: 0 without them
};

// causal_conv1d_bwd: with pre = the sum before the activation and dpre = grad_y * act'(pre),
//   dx_t = sum_k weight[k] dpre_{t+W-1-k}   dweight[k] = sum_t dpre_t x_{t-W+1+k}   dbias = sum_t dpre_t
// in which inputs before the first token are those of the initial state, whose gradient is d_initial, and
// grad_final_state is added to the gradient of the last W - 1 inputs. Tokens behind the last sequence have dx = 0.
struct BackwardParams {
  Params forward;                            // y and final unused
  Operand grad_y;                            // strides: sequence (0 where packed), token, channel
  Operand grad_final;                        // sequence, channel, input; data null: none
  void *dx, *dweight, *dbias, *d_initial;    // contiguous, dtypes of the inputs; the launcher's to fill in; null: none
};

// causal_conv1d_update, in one of three uses of conv_state [slots, C, S]:
//   kShift   the last S inputs, oldest first.
//   kWindow  S = W - 2 + T; column W-2+t is token t of the previous call, of which num_accepted[b] were accepted: the
//            history is columns a-1 .. a+W-3. Written are the last S of the history and this call's T tokens, columns
//            0 .. W-3+num_tokens[b] of them; none where num_tokens[b] is 0 (a destination gets a copy of the window).
//   kRing    input p is in column p mod S; cache_seqlens[b] inputs came before. Token t goes to column
//            (cache_seqlens[b] + t) mod S; the last S tokens stay.
enum class Use { kShift, kWindow, kRing };

// Where the states go.
enum class Destination { kSource, kLast, kEach };  // the slot read; destination(b); destination(b, t) after token t

struct UpdateParams {
  Operand x;             // strides: sequence, token, channel
  Taps taps;
  Operand state;         // slot, channel, input
  Use use;
  Indices source;        // (b), null: b; or (b, num_accepted[b] - 1) where source_cols > 0. Negative: padding
  int64_t source_cols;   // K of [B, K]; 0: source has one dimension
  Destination where;
  Indices destination;   // negative: not written
  Indices num_accepted;  // data null: not given, as for the next three
  Indices num_tokens;    // tokens from it on are padding: y = 0, never written
  Indices parents;       // (b, t) < t: the token before t on its path; -1: the state. Only with kShift and kEach
  Indices cache_seqlens;
  void* y;               // contiguous, shape and dtype of x; the launcher's to fill in
  int64_t batch, tokens, slots, kept;  // kept: S
};

inline Taps check_taps(const char* name, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const std::optional<std::string>& activation) {
  check_floating(name, "x", x.scalar_type());
  const int64_t channels = x.size(-1);
  check_dim(name, "weight", weight, 2);
  check_shape(name, "weight", weight, {channels, weight.size(1)});
  N3_CHECK(name, weight.size(1) >= 1, "weight must have at least 1 tap, got 0");
  check_floating(name, "weight", weight.scalar_type());
  if (bias) {
    check_shape(name, "bias", *bias, {channels});
    check_floating(name, "bias", bias->scalar_type());
  }
  N3_CHECK(name, !activation || *activation == "silu", "activation must be one of None, silu, got ", *activation);
  return {mamba::operand_of(weight), mamba::operand_of(bias), channels, weight.size(1), activation.has_value()};
}

// [slots, C, S] with S >= W - 1.
inline void check_state(const char* name, const Tensor& state, const Taps& taps, const Tensor& x) {
  check_dim(name, "conv_state", state, 3);
  check_shape(name, "conv_state", state, {state.size(0), taps.channels, state.size(2)});
  N3_CHECK(name, state.size(2) >= taps.width - 1, "conv_state must hold at least ", taps.width - 1, " inputs, got ",
           state.size(2));
  check_same_dtype(name, "conv_state", state, "x", x);
}

// [batch, tokens, C], or packed [tokens, C].
inline Operand tokens_of(const Tensor& x) {
  Operand o = mamba::operand_of(x);
  if (x.dim() == 2) o.strides[2] = o.strides[1], o.strides[1] = o.strides[0], o.strides[0] = 0;
  return o;
}

inline Params check_inputs(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& cu_seqlens, const std::optional<std::string>& activation) {
  Params p{};
  p.sequences = mamba::count_sequences(op, x, cu_seqlens, 3);
  p.taps = check_taps(op, x, weight, bias, activation);
  p.x = tokens_of(x);
  p.length = cu_seqlens ? 0 : x.size(1);
  p.tokens = cu_seqlens ? x.size(0) : p.sequences * p.length;
  p.cu_seqlens = mamba::indices_of(cu_seqlens);
  return p;
}

// Checks one call, for CPU and CUDA alike (values on the CPU only, by check_values); y and final are left to the
// launcher.
inline Params check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                    const std::optional<std::string>& activation) {
  Params p = check_inputs(x, weight, bias, cu_seqlens, activation);
  p.kept = p.taps.width - 1;
  if (initial_state) {
    check_shape(op, "initial_state", *initial_state, {p.sequences, p.taps.channels, p.kept});
    check_same_dtype(op, "initial_state", *initial_state, "x", x);
  }
  check_same_device(op, "weight", weight, "x", x);
  mamba::check_on_device(op, "bias", bias, x);
  mamba::check_on_device(op, "initial_state", initial_state, x);
  mamba::check_on_device(op, "cu_seqlens", cu_seqlens, x);
  p.initial = mamba::operand_of(initial_state);
  return p;
}

// The same for states in slots; y is left to the launcher.
inline Params check_slots(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& conv_state,
                          const Tensor& state_indices, const OptionalTensor& has_initial,
                          const OptionalTensor& cu_seqlens, const OptionalTensor& checkpoint_tokens,
                          const OptionalTensor& checkpoint_indices, const std::optional<std::string>& activation) {
  Params p = check_inputs(x, weight, bias, cu_seqlens, activation);
  check_state(op, conv_state, p.taps, x);
  mamba::check_slots(op, state_indices, has_initial, p.sequences);
  mamba::check_checkpoints(op, checkpoint_tokens, checkpoint_indices);
  check_same_device(op, "weight", weight, "x", x);
  mamba::check_on_device(op, "bias", bias, x);
  check_same_device(op, "conv_state", conv_state, "x", x);
  check_same_device(op, "state_indices", state_indices, "x", x);
  mamba::check_on_device(op, "has_initial", has_initial, x);
  mamba::check_on_device(op, "cu_seqlens", cu_seqlens, x);
  mamba::check_on_device(op, "checkpoint_tokens", checkpoint_tokens, x);
  mamba::check_on_device(op, "checkpoint_indices", checkpoint_indices, x);
  p.initial = p.final = mamba::operand_of(conv_state);
  p.kept = conv_state.size(2), p.slots = conv_state.size(0);
  p.state_indices = mamba::indices_of(state_indices);
  p.has_initial = mamba::operand_of(has_initial);
  p.checkpoints = checkpoint_tokens ? checkpoint_tokens->size(0) : 0;
  p.checkpoint_tokens = mamba::indices_of(checkpoint_tokens);
  p.checkpoint_indices = mamba::indices_of(checkpoint_indices);
  return p;
}

// The same for the backward; the gradients are left to the launcher.
inline BackwardParams check_bwd(const Tensor& grad_y, const OptionalTensor& grad_final_state, const Tensor& x,
                                const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_state,
                                const OptionalTensor& cu_seqlens, const std::optional<std::string>& activation) {
  BackwardParams p{};
  p.forward = check(x, weight, bias, initial_state, cu_seqlens, activation);
  N3_CHECK(bwd_op, shape_str(grad_y) == shape_str(x), "grad_y must have shape ", shape_str(x), ", got ",
           shape_str(grad_y));
  check_same_dtype(bwd_op, "grad_y", grad_y, "x", x);
  if (grad_final_state) {
    check_shape(bwd_op, "grad_final_state", *grad_final_state,
                {p.forward.sequences, p.forward.taps.channels, p.forward.kept});
    check_same_dtype(bwd_op, "grad_final_state", *grad_final_state, "x", x);
  }
  check_same_device(bwd_op, "grad_y", grad_y, "x", x);
  mamba::check_on_device(bwd_op, "grad_final_state", grad_final_state, x);
  p.grad_y = tokens_of(grad_y);
  p.grad_final = mamba::operand_of(grad_final_state);
  return p;
}

// The same for the update; y is left to the launcher.
inline UpdateParams check_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& state_indices,
                                 const OptionalTensor& dst_state_indices, const OptionalTensor& num_accepted,
                                 const OptionalTensor& num_tokens, const OptionalTensor& parents,
                                 const OptionalTensor& cache_seqlens, const std::optional<std::string>& activation) {
  const char* name = update_op;
  mamba::check_dim_of(name, "x", x, 2, 3);
  UpdateParams p{};
  p.taps = check_taps(name, x, weight, bias, activation);
  p.batch = x.size(0), p.tokens = x.dim() == 2 ? 1 : x.size(1);
  check_state(name, conv_state, p.taps, x);
  p.slots = conv_state.size(0), p.kept = conv_state.size(2);
  mamba::check_indices(name, p.batch, p.tokens, "conv_state", p.slots, state_indices, dst_state_indices, num_accepted);
  mamba::check_drafts(name, p.batch, p.tokens, dst_state_indices, num_accepted, num_tokens, parents);
  p.source_cols = state_indices && state_indices->dim() == 2 ? state_indices->size(1) : 0;
  const bool one_of_many = state_indices && state_indices->dim() == 2;  // of none too, where no count is right
  p.use = cache_seqlens ? Use::kRing : num_accepted && !one_of_many ? Use::kWindow : Use::kShift;
  if (cache_seqlens) {
    check_shape(name, "cache_seqlens", *cache_seqlens, {p.batch});
    check_dtype(name, "cache_seqlens", *cache_seqlens, ScalarType::Int);
    N3_CHECK(name, !dst_state_indices, "dst_state_indices must be None with cache_seqlens");
    N3_CHECK(name, !num_accepted, "num_accepted must be None with cache_seqlens");
    N3_CHECK(name, !parents, "parents must be None with cache_seqlens");
  }
  if (p.use == Use::kWindow) {
    const int64_t want = p.taps.width - 2 + p.tokens;
    N3_CHECK(name, p.kept == want, "conv_state must hold W - 2 + T = ", want, " inputs with num_accepted, got ",
             p.kept);
    N3_CHECK(name, !dst_state_indices || dst_state_indices->dim() == 1,
             "dst_state_indices must have 1 dimensions with num_accepted, got 2");
  }
  check_same_device(name, "conv_state", conv_state, "x", x);
  check_same_device(name, "weight", weight, "x", x);
  mamba::check_on_device(name, "bias", bias, x);
  mamba::check_on_device(name, "state_indices", state_indices, x);
  mamba::check_on_device(name, "dst_state_indices", dst_state_indices, x);
  mamba::check_on_device(name, "num_accepted", num_accepted, x);
  mamba::check_on_device(name, "num_tokens", num_tokens, x);
  mamba::check_on_device(name, "parents", parents, x);
  mamba::check_on_device(name, "cache_seqlens", cache_seqlens, x);

  p.x = mamba::per_token_operand(x, 1);
  p.state = mamba::operand_of(conv_state);
  p.source = mamba::indices_of(state_indices);
  p.where = !dst_state_indices ? Destination::kSource
            : dst_state_indices->dim() == 1 ? Destination::kLast : Destination::kEach;
  p.destination = mamba::indices_of(dst_state_indices);
  p.num_accepted = mamba::indices_of(num_accepted), p.num_tokens = mamba::indices_of(num_tokens);
  p.parents = mamba::indices_of(parents), p.cache_seqlens = mamba::indices_of(cache_seqlens);
  return p;
}

}  // namespace n3::causal_conv1d
