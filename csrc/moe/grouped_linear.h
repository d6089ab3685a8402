// grouped_linear: y[r] = row_scale[r] * act(w[g] x[gather[r]]) for the rows offsets[g] <= r < offsets[g + 1]; zeros in
// rows of no group and where gather[r] < 0.
#pragma once
#include <optional>
#include <string>

#include "../common/check.h"
#include "grouped_activation.h"

namespace n3::grouped_linear {

constexpr const char* op = "grouped_linear";

struct Params {
  const void* x;               // [m, k]
  const void* w;               // [groups, n, k], or codes [groups, n, k / 2]
  const uint8_t* block_scale;  // [groups, n, k / 16]; null: dense
  const float* global_scale;   // [groups]
  const int32_t* offsets;      // [groups + 1]
  const int32_t* gather;       // [rows] or null
  const float* row_scale;      // [rows] or null
  void* y;                     // [rows, outputs]
  int64_t m, rows, groups, n, k;
  int64_t outputs;             // n, or n / 2
  Activation activation;
  bool dense;
};

using OptionalTensor = std::optional<Tensor>;

inline Activation check_activation(const char* name, const std::optional<std::string>& activation) {
  if (!activation) return Activation::kNone;
  if (*activation == "relu2") return Activation::kRelu2;
  if (*activation == "silu") return Activation::kSilu;
  N3_CHECK(name, *activation == "gelu", "activation must be one of None, relu2, silu, gelu, got ", *activation);
  return Activation::kGelu;
}

inline void check_weights(const char* name, const Tensor& x, const Tensor& w, const OptionalTensor& block_scale,
                          const OptionalTensor& global_scale) {
  const int64_t groups = w.size(0), n = w.size(1), k = x.size(1);
  const int given = block_scale.has_value() + global_scale.has_value();
  N3_CHECK(name, given != 1, "block_scale and global_scale must be given together or not at all, got 1 of 2");
  if (!given) {
    check_same_dtype(name, "w", w, "x", x);
    check_shape(name, "w", w, {groups, n, k});
    return;
  }
  N3_CHECK(name, k > 0 && k % 16 == 0, "the last dimension of x must be a positive multiple of 16, got ", k);
  check_dtype(name, "w", w, ScalarType::Byte);
  check_shape(name, "w", w, {groups, n, k / 2});
  check_dtype(name, "block_scale", *block_scale, ScalarType::Float8_e4m3fn);
  check_shape(name, "block_scale", *block_scale, {groups, n, k / 16});
  check_dtype(name, "global_scale", *global_scale, ScalarType::Float);
  check_shape(name, "global_scale", *global_scale, {groups});
}

// Checks one call, for CPU and CUDA alike, in the name of an operator; returns the problem with null pointers.
inline Params check(const char* name, const Tensor& x, const Tensor& w, const Tensor& offsets,
                    const OptionalTensor& gather, const OptionalTensor& row_scale, const OptionalTensor& block_scale,
                    const OptionalTensor& global_scale, const std::optional<std::string>& activation) {
  check_floating(name, "x", x.scalar_type());
  check_dim(name, "x", x, 2);
  const Activation act = check_activation(name, activation);
  check_dim(name, "w", w, 3);
  const int64_t groups = w.size(0), n = w.size(1);
  const bool gated = is_gated(act);
  N3_CHECK(name, groups >= 1, "w must have at least 1 group, got ", groups);
  N3_CHECK(name, !gated || n % 2 == 0, "w must have an even number of rows per group for ", *activation, ", got ", n);
  check_weights(name, x, w, block_scale, global_scale);
  check_dtype(name, "offsets", offsets, ScalarType::Int);
  check_shape(name, "offsets", offsets, {groups + 1});
  if (gather) {
    check_dtype(name, "gather", *gather, ScalarType::Int);
    check_dim(name, "gather", *gather, 1);
  }
  const int64_t rows = gather ? gather->size(0) : x.size(0);
  if (row_scale) {
    check_dtype(name, "row_scale", *row_scale, ScalarType::Float);
    check_shape(name, "row_scale", *row_scale, {rows});
  }
  check_same_device(name, "w", w, "x", x);
  check_same_device(name, "offsets", offsets, "x", x);
  if (gather) check_same_device(name, "gather", *gather, "x", x);
  if (row_scale) check_same_device(name, "row_scale", *row_scale, "x", x);
  if (block_scale) check_same_device(name, "block_scale", *block_scale, "x", x);
  if (global_scale) check_same_device(name, "global_scale", *global_scale, "x", x);
  Params p{};
  p.m = x.size(0), p.rows = rows, p.groups = groups, p.n = n, p.k = x.size(1);
  p.outputs = gated ? n / 2 : n;
  p.activation = act, p.dense = !block_scale;
  return p;
}

// What only the values tell, on the CPU.
inline void check_values(const char* name, const Params& p) {
  int64_t before = 0;
  for (int64_t g = 0; g <= p.groups; ++g) {
    const int64_t end = p.offsets[g];
    N3_CHECK(name, end >= 0 && end <= p.rows, "offsets must be between 0 and ", p.rows, ", got ", end);
    N3_CHECK(name, end >= before, "offsets must not fall, got ", end, " after ", before);
    before = end;
  }
  for (int64_t r = 0; p.gather && r < p.rows; ++r) {
    N3_CHECK(name, p.gather[r] < p.m, "gather must be below the ", p.m, " rows of x, got ", p.gather[r]);
  }
}

}  // namespace n3::grouped_linear
