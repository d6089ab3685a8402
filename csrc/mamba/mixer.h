// The whole mixer between in_proj and out_proj: causal_conv1d over x | B | C, ssd_scan or ssm_update, gated_rms_norm,
// on the columns z | x | B | C | dt of one matrix, with nothing rounded in between.
#pragma once
#include <optional>
#include <string>

#include "conv1d.h"
#include "operands.h"
#include "ssd_scan.h"
#include "ssm_update.h"

namespace n3::mamba2 {

using mamba::Indices;
using mamba::Operand;
using mamba::OptionalTensor;

constexpr const char* prefill_op = "mamba2_prefill";
constexpr const char* decode_op = "mamba2_decode";

// The sizes of a mixer and what prefill and decode share.
struct Mixer {
  int64_t heads, groups, head_dim, d_state;  // H, G, P, N
  int64_t inner, channels, columns;          // H P; inner + 2 G N, of the convolution; inner + channels + H, of zxbcdt
  int64_t slots, width, kept;                // W; inputs in a state of the convolution
  Operand norm_weight;                       // stride: channel; data null: y * silu(z)
  int64_t group_size;                        // of the norm
  float eps;
  bool norm_before_gate;
};

// Everything but the dtype of the SSM state, slots and options of the scan; in the order of Python's check_mixer.
inline Mixer check_mixer(const char* op, const Tensor& zxbcdt, const Tensor& conv_weight,
                         const OptionalTensor& conv_bias, const Tensor& conv_state, const Tensor& ssm_state,
                         const Tensor& A, const OptionalTensor& D, const OptionalTensor& dt_bias,
                         const OptionalTensor& norm_weight, std::optional<int64_t> group_size, double eps,
                         bool norm_before_gate, const std::optional<std::string>& activation, double dt_min,
                         std::optional<double> dt_max) {
  check_floating(op, "zxbcdt", zxbcdt.scalar_type());
  check_dim(op, "ssm_state", ssm_state, 4);
  Mixer m{};
  m.slots = ssm_state.size(0), m.heads = ssm_state.size(1), m.head_dim = ssm_state.size(2);
  m.d_state = ssm_state.size(3), m.inner = m.heads * m.head_dim;
  check_dim(op, "conv_weight", conv_weight, 2);
  m.channels = conv_weight.size(0), m.width = conv_weight.size(1);
  N3_CHECK(op, m.width >= 1, "conv_weight must have at least 1 tap, got ", m.width);
  const int64_t rest = m.channels - m.inner, pair = 2 * m.d_state;
  m.groups = pair && rest >= 0 ? rest / pair : 0;
  N3_CHECK(op, m.groups > 0 && rest % pair == 0 && m.heads % m.groups == 0, "conv_weight must have ", m.inner,
           " + 2 G ", m.d_state, " rows with G a divisor of the ", m.heads, " heads of ssm_state, got ", m.channels);
  check_floating(op, "conv_weight", conv_weight.scalar_type());
  m.columns = m.inner + m.channels + m.heads;
  if (zxbcdt.size(-1) != m.columns) {
    std::string want = "[";
    for (int64_t i = 0; i + 1 < zxbcdt.dim(); ++i) want += std::to_string(zxbcdt.size(i)) + ", ";
    fail(op, "zxbcdt must have shape ", want, m.columns, "], got ", shape_str(zxbcdt));
  }
  if (conv_bias) {
    check_shape(op, "conv_bias", *conv_bias, {m.channels});
    check_floating(op, "conv_bias", conv_bias->scalar_type());
  }
  check_dim(op, "conv_state", conv_state, 3);
  m.kept = conv_state.size(2);
  check_shape(op, "conv_state", conv_state, {m.slots, m.channels, m.kept});
  N3_CHECK(op, m.kept >= m.width - 1, "conv_state must hold at least ", m.width - 1, " inputs, got ", m.kept);
  check_same_dtype(op, "conv_state", conv_state, "zxbcdt", zxbcdt);
  check_shape(op, "A", A, {m.heads});
  check_floating(op, "A", A.scalar_type());
  if (D) {
    mamba::check_dim_of(op, "D", *D, 1, 2);
    if (D->dim() == 1) {
      check_shape(op, "D", *D, {m.heads});
    } else {
      check_shape(op, "D", *D, {m.heads, m.head_dim});
    }
    check_floating(op, "D", D->scalar_type());
  }
  if (dt_bias) {
    check_shape(op, "dt_bias", *dt_bias, {m.heads});
    check_floating(op, "dt_bias", dt_bias->scalar_type());
  }
  if (norm_weight) {
    check_shape(op, "norm_weight", *norm_weight, {m.inner});
    check_floating(op, "norm_weight", norm_weight->scalar_type());
  }
  m.group_size = group_size.value_or(m.inner / m.groups);
  N3_CHECK(op, !group_size || (*group_size > 0 && m.inner % *group_size == 0), "group_size must divide the ", m.inner,
           " channels of norm_weight, got ", m.group_size);
  N3_CHECK(op, !activation || *activation == "silu", "activation must be one of None, silu, got ", *activation);
  if (dt_max) {
    char low[32], high[32];
    std::snprintf(low, sizeof low, "%g", dt_min);
    std::snprintf(high, sizeof high, "%g", *dt_max);
    N3_CHECK(op, *dt_max >= dt_min, "dt_max must be at least dt_min (", low, "), got ", high);
  }
  const auto on_device = [&](const char* name, const OptionalTensor& t) {
    if (t) check_same_device(op, name, *t, "zxbcdt", zxbcdt);
  };
  on_device("conv_weight", conv_weight), on_device("conv_bias", conv_bias), on_device("conv_state", conv_state);
  on_device("ssm_state", ssm_state), on_device("A", A), on_device("D", D), on_device("dt_bias", dt_bias);
  on_device("norm_weight", norm_weight);
  m.norm_weight = mamba::operand_of(norm_weight);
  m.eps = float(eps), m.norm_before_gate = norm_before_gate;
  return m;
}

// The columns of zxbcdt from `first` on; strides: sequence, token, column.
inline Operand columns_of(const Tensor& zxbcdt, int64_t first) {
  Operand o = mamba::per_token_operand(zxbcdt, 1);
  const int64_t bytes = zxbcdt.scalar_type() == ScalarType::Float ? 4 : 2;
  if (o.data) o.data = static_cast<char*>(o.data) + first * o.strides[2] * bytes;
  return o;
}

// ---- prefill

// The parts' own problems. Left open are what passes between them: y of `conv`, x, B, C and y of `scan`.
struct PrefillParams {
  Mixer mixer;
  causal_conv1d::Params conv;  // of columns x | B | C
  ssd_scan::Params scan;       // dt from its columns; no gate
  Operand z;                   // strides: sequence (0 where packed), token, channel
};

inline PrefillParams check_prefill(const Tensor& zxbcdt, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                                   const Tensor& conv_state, const Tensor& ssm_state, const Tensor& state_indices,
                                   const Tensor& A, const OptionalTensor& D, const OptionalTensor& dt_bias,
                                   const OptionalTensor& norm_weight, const OptionalTensor& has_initial,
                                   const OptionalTensor& cu_seqlens, const OptionalTensor& checkpoint_tokens,
                                   const OptionalTensor& checkpoint_indices, std::optional<int64_t> group_size,
                                   double eps, bool norm_before_gate, const std::optional<std::string>& activation,
                                   int64_t chunk_size, bool dt_softplus, double dt_min,
                                   std::optional<double> dt_max) {
  const char* op = prefill_op;
  PrefillParams p{};
  const int64_t sequences = mamba::count_sequences(op, zxbcdt, cu_seqlens, 3, "zxbcdt");
  const Mixer& m = p.mixer =
      check_mixer(op, zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight, group_size,
                  eps, norm_before_gate, activation, dt_min, dt_max);
  check_floating(op, "ssm_state", ssm_state.scalar_type());
  mamba::check_slots(op, state_indices, has_initial, sequences);
  mamba::check_checkpoints(op, checkpoint_tokens, checkpoint_indices);
  N3_CHECK(op, chunk_size >= 1, "chunk_size must be at least 1, got ", chunk_size);
  const auto on_device = [&](const char* name, const OptionalTensor& t) {
    if (t) check_same_device(op, name, *t, "zxbcdt", zxbcdt);
  };
  on_device("state_indices", state_indices), on_device("has_initial", has_initial);
  on_device("cu_seqlens", cu_seqlens), on_device("checkpoint_tokens", checkpoint_tokens);
  on_device("checkpoint_indices", checkpoint_indices);

  const bool packed = cu_seqlens.has_value();
  const auto columns = [&](int64_t first) {
    Operand o = columns_of(zxbcdt, first);  // which takes two dimensions for one token each
    if (packed) o.strides[1] = o.strides[0], o.strides[0] = 0;
    return o;
  };
  p.z = columns(0);
  causal_conv1d::Params& c = p.conv;
  c.x = columns(m.inner);
  c.taps = {mamba::operand_of(conv_weight), mamba::operand_of(conv_bias), m.channels, m.width, activation.has_value()};
  c.initial = c.final = mamba::operand_of(conv_state);
  c.kept = m.kept, c.slots = m.slots;
  c.state_indices = mamba::indices_of(state_indices), c.has_initial = mamba::operand_of(has_initial);
  c.cu_seqlens = mamba::indices_of(cu_seqlens);
  c.checkpoints = checkpoint_tokens ? checkpoint_tokens->size(0) : 0;
  c.checkpoint_tokens = mamba::indices_of(checkpoint_tokens);
  c.checkpoint_indices = mamba::indices_of(checkpoint_indices);
  c.sequences = sequences;
  c.length = packed ? 0 : zxbcdt.size(1);
  c.tokens = packed ? zxbcdt.size(0) : sequences * c.length;

  ssd_scan::Params& s = p.scan;
  s.dt = columns(m.inner + m.channels);
  s.A = mamba::operand_of(A), s.D = mamba::operand_of(D), s.dt_bias = mamba::operand_of(dt_bias);
  s.initial = s.final = mamba::operand_of(ssm_state);
  s.state_indices = c.state_indices, s.has_initial = c.has_initial, s.cu_seqlens = c.cu_seqlens;
  s.checkpoint_tokens = c.checkpoint_tokens, s.checkpoint_indices = c.checkpoint_indices;
  s.sequences = sequences, s.tokens = c.tokens, s.length = c.length;
  s.slots = m.slots, s.checkpoints = c.checkpoints;
  s.heads = m.heads, s.groups = m.groups, s.head_dim = m.head_dim, s.d_state = m.d_state;
  s.dt_softplus = dt_softplus, s.dt_min = float(dt_min), s.dt_max = dt_max ? float(*dt_max) : __builtin_inff();
  return p;
}

// ---- decode

// The parts' own problems. Left open are what passes between them: y of `conv`, x, B, C and y of `ssm`.
struct DecodeParams {
  Mixer mixer;
  causal_conv1d::UpdateParams conv;  // of columns x | B | C; kShift
  ssm_update::Params ssm;            // dt from its columns; no gate
  Operand z;                         // strides: sequence, token, channel
};

inline DecodeParams check_decode(const Tensor& zxbcdt, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                                 const Tensor& conv_state, const Tensor& ssm_state, const Tensor& A,
                                 const OptionalTensor& D, const OptionalTensor& dt_bias,
                                 const OptionalTensor& norm_weight, const OptionalTensor& state_indices,
                                 const OptionalTensor& dst_state_indices, const OptionalTensor& num_accepted,
                                 const OptionalTensor& num_tokens, const OptionalTensor& parents,
                                 const OptionalTensor& state_scale, const OptionalTensor& seed,
                                 const std::string& rounding, std::optional<int64_t> group_size, double eps,
                                 bool norm_before_gate, const std::optional<std::string>& activation,
                                 bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  const char* op = decode_op;
  mamba::check_dim_of(op, "zxbcdt", zxbcdt, 2, 3);
  DecodeParams p{};
  const Mixer& m = p.mixer =
      check_mixer(op, zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight, group_size,
                  eps, norm_before_gate, activation, dt_min, dt_max);
  ssm_update::check_state_dtype(op, "ssm_state", ssm_state);
  const int64_t batch = zxbcdt.size(0), tokens = zxbcdt.dim() == 2 ? 1 : zxbcdt.size(1);
  mamba::check_indices(op, batch, tokens, "ssm_state", m.slots, state_indices, dst_state_indices, num_accepted);
  mamba::check_drafts(op, batch, tokens, dst_state_indices, num_accepted, num_tokens, parents);
  mamba::check_accepted_slots(op, state_indices, num_accepted);
  mamba::check_rounding(op, ssm_state, state_scale, seed, rounding);
  const auto on_device = [&](const char* name, const OptionalTensor& t) {
    if (t) check_same_device(op, name, *t, "zxbcdt", zxbcdt);
  };
  on_device("state_indices", state_indices), on_device("dst_state_indices", dst_state_indices);
  on_device("num_accepted", num_accepted), on_device("num_tokens", num_tokens), on_device("parents", parents);
  on_device("state_scale", state_scale), on_device("seed", seed);

  const Indices source = mamba::indices_of(state_indices), destination = mamba::indices_of(dst_state_indices);
  const int64_t cols = state_indices && state_indices->dim() == 2 ? state_indices->size(1) : 0;
  const int where = !dst_state_indices ? 0 : dst_state_indices->dim() == 1 ? 1 : 2;

  p.z = columns_of(zxbcdt, 0);
  causal_conv1d::UpdateParams& c = p.conv;
  c.x = columns_of(zxbcdt, m.inner);
  c.taps = {mamba::operand_of(conv_weight), mamba::operand_of(conv_bias), m.channels, m.width, activation.has_value()};
  c.state = mamba::operand_of(conv_state);
  c.use = causal_conv1d::Use::kShift;
  c.source = source, c.source_cols = cols, c.where = causal_conv1d::Destination(where), c.destination = destination;
  c.num_accepted = mamba::indices_of(num_accepted), c.num_tokens = mamba::indices_of(num_tokens);
  c.parents = mamba::indices_of(parents);
  c.batch = batch, c.tokens = tokens, c.slots = m.slots, c.kept = m.kept;

  ssm_update::Params& s = p.ssm;
  s.batch = batch, s.tokens = tokens, s.heads = m.heads, s.head_dim = m.head_dim, s.groups = m.groups;
  s.d_state = m.d_state, s.slots = m.slots;
  s.state = mamba::operand_of(ssm_state), s.state_scale = mamba::operand_of(state_scale);
  s.dt = columns_of(zxbcdt, m.inner + m.channels);
  s.A = mamba::operand_of(A), s.dt_bias = mamba::operand_of(dt_bias), s.D = mamba::operand_of(D);
  s.source = source, s.source_cols = cols, s.where = ssm_update::Destination(where), s.destination = destination;
  s.num_accepted = c.num_accepted, s.num_tokens = c.num_tokens, s.parents = c.parents;
  s.seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
  s.seed_stride = seed ? seed->stride(0) : 0;
  s.stochastic = rounding == "stochastic" && ssm_state.scalar_type() != ScalarType::Float;
  s.dt_softplus = dt_softplus, s.dt_min = float(dt_min), s.dt_max = dt_max ? float(*dt_max) : __builtin_inff();
  return p;
}

}  // namespace n3::mamba2
