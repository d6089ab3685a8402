// Checks shared by the mamba operators; the Python twins are n3kernels/mamba/_sequences.py and check_operands in
// n3kernels/mamba/ssd_scan.py, in the same order and words.
#pragma once
#include <algorithm>
#include <cstdio>
#include <optional>
#include <string>

#include "../common/check.h"

namespace n3::mamba {

using OptionalTensor = std::optional<Tensor>;

inline void check_dim_of(const char* op, const char* name, const Tensor& t, int64_t one, int64_t other) {
  N3_CHECK(op, t.dim() == one || t.dim() == other, name, " must have ", one, " or ", other, " dimensions, got ",
           t.dim());
}

inline void check_index_dtype(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  N3_CHECK(op, dtype == ScalarType::Int || dtype == ScalarType::Long, name, " must be int32 or int64, got ",
           dtype_name(dtype));
}

inline void check_on_device(const char* op, const char* name, const OptionalTensor& t, const Tensor& x) {
  if (t) check_same_device(op, name, *t, "x", x);
}

// Sequences in x: its batch (`dim` dimensions), or one less than the ends when it is packed.
inline int64_t count_sequences(const char* op, const Tensor& x, const OptionalTensor& cu_seqlens, int64_t dim,
                               const char* name = "x") {
  if (!cu_seqlens) {
    N3_CHECK(op, x.dim() == dim, name, " must have ", dim, " dimensions without cu_seqlens, got ", x.dim());
    return x.size(0);
  }
  N3_CHECK(op, x.dim() == dim - 1, name, " must have ", dim - 1, " dimensions with cu_seqlens, got ", x.dim());
  check_dim(op, "cu_seqlens", *cu_seqlens, 1);
  check_dtype(op, "cu_seqlens", *cu_seqlens, ScalarType::Int);
  N3_CHECK(op, cu_seqlens->size(0) >= 1, "cu_seqlens must have at least 1 element, got 0");
  return cu_seqlens->size(0) - 1;
}

inline void check_slots(const char* op, const Tensor& state_indices, const OptionalTensor& has_initial,
                        int64_t sequences) {
  check_shape(op, "state_indices", state_indices, {sequences});
  check_index_dtype(op, "state_indices", state_indices);
  if (has_initial) {
    check_shape(op, "has_initial", *has_initial, {sequences});
    check_dtype(op, "has_initial", *has_initial, ScalarType::Bool);
  }
}

// The tokens after which a prefill also keeps its state, and the slots where: both or neither.
inline void check_checkpoints(const char* op, const OptionalTensor& tokens, const OptionalTensor& indices) {
  if (!tokens && !indices) return;
  N3_CHECK(op, tokens, "checkpoint_tokens must be given with checkpoint_indices, got None");
  N3_CHECK(op, indices, "checkpoint_indices must be given with checkpoint_tokens, got None");
  check_dim(op, "checkpoint_tokens", *tokens, 1);
  check_dtype(op, "checkpoint_tokens", *tokens, ScalarType::Int);
  check_shape(op, "checkpoint_indices", *indices, {tokens->size(0)});
  check_index_dtype(op, "checkpoint_indices", *indices);
}

// The slots of an update: where each sequence's state is read, and where it is written.
inline void check_indices(const char* op, int64_t batch, int64_t tokens, const char* state, int64_t slots,
                          const OptionalTensor& source, const OptionalTensor& destination,
                          const OptionalTensor& num_accepted) {
  if (!source) {
    N3_CHECK(op, slots >= batch, state, " must have at least ", batch, " slots without state_indices, got ", slots);
  } else if (num_accepted && source->dim() == 2) {
    check_shape(op, "state_indices", *source, {batch, source->size(1)});
    check_index_dtype(op, "state_indices", *source);
  } else {
    check_slots(op, *source, {}, batch);
  }
  if (!destination) return;
  check_dim_of(op, "dst_state_indices", *destination, 1, 2);
  if (destination->dim() == 1) {
    check_shape(op, "dst_state_indices", *destination, {batch});
  } else {
    check_shape(op, "dst_state_indices", *destination, {batch, tokens});
  }
  check_index_dtype(op, "dst_state_indices", *destination);
}

// The arguments of speculative decoding, all int32.
inline void check_drafts(const char* op, int64_t batch, int64_t tokens, const OptionalTensor& destination,
                         const OptionalTensor& num_accepted, const OptionalTensor& num_tokens,
                         const OptionalTensor& parents) {
  if (num_accepted) {
    check_shape(op, "num_accepted", *num_accepted, {batch});
    check_dtype(op, "num_accepted", *num_accepted, ScalarType::Int);
  }
  if (num_tokens) {
    check_shape(op, "num_tokens", *num_tokens, {batch});
    check_dtype(op, "num_tokens", *num_tokens, ScalarType::Int);
  }
  if (!parents) return;
  check_shape(op, "parents", *parents, {batch, tokens});
  check_dtype(op, "parents", *parents, ScalarType::Int);
  N3_CHECK(op, destination, "dst_state_indices must be given with parents, got None");
  N3_CHECK(op, destination->dim() == 2, "dst_state_indices must have 2 dimensions with parents, got ",
           destination->dim());
}

// An SSM state cannot be rolled back: to go on from the last accepted token there is a slot for each.
inline void check_accepted_slots(const char* op, const OptionalTensor& source, const OptionalTensor& num_accepted) {
  if (!num_accepted) return;
  N3_CHECK(op, source, "state_indices must be given with num_accepted, got None");
  N3_CHECK(op, source->dim() == 2, "state_indices must have 2 dimensions with num_accepted, got ", source->dim());
}

// How states of other dtypes than float32 are rounded. `state` is [slots, H, P, N].
inline void check_rounding(const char* op, const Tensor& state, const OptionalTensor& state_scale,
                           const OptionalTensor& seed, const std::string& rounding) {
  const ScalarType dtype = state.scalar_type();
  const bool scaled = dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn;
  N3_CHECK(op, !scaled || state_scale, "state_scale must be given with a state of ", dtype_name(dtype), ", got None");
  N3_CHECK(op, scaled || !state_scale, "state_scale must be None with a state of ", dtype_name(dtype));
  if (state_scale) {
    check_shape(op, "state_scale", *state_scale, {state.size(0), state.size(1), state.size(2)});
    check_dtype(op, "state_scale", *state_scale, ScalarType::Float);
  }
  N3_CHECK(op, rounding == "nearest" || rounding == "stochastic", "rounding must be one of nearest, stochastic, got ",
           rounding);
  N3_CHECK(op, rounding == "nearest" || seed, "seed must be given for rounding=stochastic, got None");
  if (seed) {
    check_dtype(op, "seed", *seed, ScalarType::Long);
    check_shape(op, "seed", *seed, {2});
  }
}

// All operands of scan and update but states and indices; x is [..., heads, head_dim] whatever the leading dimensions.
inline void check_operands(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                           const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                           const OptionalTensor& dt_bias, double dt_min, std::optional<double> dt_max) {
  check_floating(op, "x", x.scalar_type());
  const int64_t leading = x.dim() - 2, heads = x.size(-2), head_dim = x.size(-1);
  const auto leads = [&](const Tensor& t) {
    for (int64_t i = 0; i < leading; ++i) {
      if (t.size(i) != x.size(i)) return false;
    }
    return true;
  };
  const auto expected = [&](std::initializer_list<int64_t> last) {
    std::string s = "[";
    for (int64_t i = 0; i < leading; ++i) s += std::to_string(x.size(i)) + ", ";
    for (const int64_t* size = last.begin(); size != last.end(); ++size) {
      s += (size == last.begin() ? "" : ", ") + std::to_string(*size);
    }
    return s + "]";
  };
  N3_CHECK(op, dt.dim() == leading + 1 && leads(dt) && dt.size(-1) == heads, "dt must have shape ", expected({heads}),
           ", got ", shape_str(dt));
  check_floating(op, "dt", dt.scalar_type());
  check_shape(op, "A", A, {heads});
  check_floating(op, "A", A.scalar_type());
  check_dim(op, "B", B, x.dim());
  const int64_t groups = B.size(-2);
  N3_CHECK(op, leads(B), "B must have shape ", expected({groups, B.size(-1)}), ", got ", shape_str(B));
  check_same_dtype(op, "B", B, "x", x);
  N3_CHECK(op, groups > 0 && heads % groups == 0, "groups of B must divide the ", heads, " heads of x, got ", groups);
  N3_CHECK(op, shape_str(C) == shape_str(B), "C must have shape ", shape_str(B), ", got ", shape_str(C));
  check_same_dtype(op, "C", C, "x", x);
  if (D) {
    check_dim_of(op, "D", *D, 1, 2);
    if (D->dim() == 1) {
      check_shape(op, "D", *D, {heads});
    } else {
      check_shape(op, "D", *D, {heads, head_dim});
    }
    check_floating(op, "D", D->scalar_type());
  }
  if (z) {
    N3_CHECK(op, shape_str(*z) == shape_str(x), "z must have shape ", shape_str(x), ", got ", shape_str(*z));
    check_same_dtype(op, "z", *z, "x", x);
  }
  if (dt_bias) {
    check_shape(op, "dt_bias", *dt_bias, {heads});
    check_floating(op, "dt_bias", dt_bias->scalar_type());
  }
  if (dt_max) {
    char low[32], high[32];
    std::snprintf(low, sizeof low, "%g", dt_min);
    std::snprintf(high, sizeof high, "%g", *dt_max);
    N3_CHECK(op, *dt_max >= dt_min, "dt_max must be at least dt_min (", low, "), got ", high);
  }
  check_same_device(op, "dt", dt, "x", x);
  check_same_device(op, "A", A, "x", x);
  check_same_device(op, "B", B, "x", x);
  check_same_device(op, "C", C, "x", x);
  check_on_device(op, "D", D, x);
  check_on_device(op, "z", z, x);
  check_on_device(op, "dt_bias", dt_bias, x);
}

// A tensor that is read, or written, where it lies; strides count elements.
struct Operand {
  void* data = nullptr;  // null: not given
  ScalarType dtype = ScalarType::Float;
  int64_t strides[4] = {0, 0, 0, 0};  // of a per-token operand: sequence, token, and its last dimensions
};

inline Operand operand_of(const OptionalTensor& t) {
  Operand o;
  if (!t) return o;
  o.data = const_cast<void*>(t->const_data_ptr());
  o.dtype = t->scalar_type();
  for (int64_t i = 0; i < t->dim(); ++i) o.strides[i] = t->stride(i);
  return o;
}

// `last`: dimensions behind the sequence and, where x has one, the token.
inline Operand per_token_operand(const OptionalTensor& t, int64_t last) {
  Operand o = operand_of(t);
  if (!t || t->dim() != last + 1) return o;
  o.strides[3] = o.strides[2];
  o.strides[2] = o.strides[1];
  o.strides[1] = 0;
  return o;
}

// An index tensor of int32 or int64, read on the CPU.
struct Indices {
  const void* data = nullptr;  // null: 0, 1, 2, ...
  bool wide = false;
  int64_t strides[2] = {0, 0};

  int64_t operator()(int64_t i, int64_t j = 0) const {
    if (!data) return i;
    const int64_t at = i * strides[0] + j * strides[1];
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

inline Indices indices_of(const OptionalTensor& t) {
  if (!t) return {};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Long, {t->stride(0), t->dim() > 1 ? t->stride(1) : 0}};
}

// The values of a prefill's indices, for the CPU; Params is that of the convolution or of the scan. `name`: the argument
// whose tokens cu_seqlens counts. The Python twin is check_prefill in n3kernels/mamba/_slots.py.
template <typename Params>
void check_prefill_values(const char* op, const char* name, const Params& p) {
  if (const Indices& ends = p.cu_seqlens; ends.data) {
    bool rises = ends(0) == 0 && ends(p.sequences) <= p.tokens;
    for (int64_t s = 0; s < p.sequences; ++s) rises = rises && ends(s) <= ends(s + 1);
    std::ostringstream list;
    for (int64_t s = 0; s <= p.sequences && !rises; ++s) list << (s ? ", " : "[") << ends(s);
    N3_CHECK(op, rises, "cu_seqlens must rise from 0 to at most the ", p.tokens, " tokens of ", name, ", got ",
             list.str(), "]");
  }
  if (!p.state_indices.data) return;
  const auto check_below = [&](const char* which, const Indices& indices, int64_t count) {
    int64_t largest = -1;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, indices(i));
    N3_CHECK(op, largest < p.slots, which, " must be below the number of slots ", p.slots, ", got ", largest);
  };
  check_below("state_indices", p.state_indices, p.sequences);
  for (int64_t k = 0; k < p.checkpoints; ++k) {
    const int64_t token = p.checkpoint_tokens(k);
    N3_CHECK(op, token >= 0 && token < p.tokens, "checkpoint_tokens must be between 0 and ", p.tokens - 1, ", got ",
             token);
  }
  check_below("checkpoint_indices", p.checkpoint_indices, p.checkpoints);
}

}  // namespace n3::mamba
