// nvfp4_gemm: y = (a b^T) * a_global * b_global + bias of two NVFP4 matrices (W4A4); nvfp4_grouped_gemm: the same with
// the matrix b[e] for the rows offsets[e] <= i < offsets[e + 1] of a, and zeros in rows of no expert. Sums are fp32,
// the global scales are two fp32 products, and the result is rounded once to out_dtype.
//
// nvfp4_gemm.quantized: NVFP4 of act(y) under a given global scale, y being fp32: the bytes that nvfp4_quantize makes of
// it, which is rounded to nothing in between.
#pragma once
#include <optional>
#include <string>

#include "../common/check.h"
#include "gemm_plan.h"

namespace n3::nvfp4_gemm {

// One operand: `count` matrices of NVFP4 codes with their scales.
struct Matrix {
  const uint8_t* q;      // [count, rows, k / 2]
  const uint8_t* scale;  // [count, rows, k / 16], or for each matrix its 128x4 tiles, padded to [rows_128, ks_4]
  const float* global;   // [1], or one per row; of b in a grouped call: one per matrix
  bool swizzled;         // scale is in 128x4 tiles, whose padding may hold anything and must not matter
  bool global_per_row;
};

struct Params {
  Matrix a, b;             // [m, k] and [n, k], or [experts, n, k]
  const int32_t* offsets;  // [experts + 1]; null: one product of the whole
  const void* bias;        // [n] in out_dtype, or null
  void* y;                 // [m, n], or codes [m, n / 2]
  int64_t m, n, k, experts;
  ScalarType out_dtype;
  const Codes* codes = nullptr;  // what goes with codes at y; the bias is float32 then
};

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t rounded_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Scale bytes of one matrix of `rows` rows: the step from an expert's scales to the next one's.
constexpr int64_t scale_bytes(bool swizzled, int64_t rows, int64_t k) {
  return swizzled ? rounded_up(rows, 128) * rounded_up(k / 16, 4) : rows * (k / 16);
}

inline bool check_layout(const char* op, const char* name, const std::string& layout) {
  N3_CHECK(op, layout == "linear" || layout == "128x4", name, "_layout must be one of linear, 128x4, got ", layout);
  return layout == "128x4";
}

inline int64_t check_k(const char* op, const Tensor& a) {
  check_dim(op, "a", a, 2);
  const int64_t width = a.size(1);
  N3_CHECK(op, width > 0 && width % 8 == 0, "a must have a last dimension that is a positive multiple of 8, got ",
           width);
  return width * 2;
}

// Codes, scales and layout of `name`, which has `count` matrices if it has three dimensions.
inline Matrix check_matrix(const char* op, const char* name, const Tensor& q, const Tensor& scale,
                           const std::string& layout, int64_t count, int64_t rows, int64_t k) {
  const std::string scale_name = std::string(name) + "_scale";
  const bool stack = q.dim() == 3;
  check_dtype(op, name, q, ScalarType::Byte);
  check_dtype(op, scale_name.c_str(), scale, ScalarType::Float8_e4m3fn);
  if (stack) {
    check_shape(op, name, q, {count, rows, k / 2});
  } else {
    check_shape(op, name, q, {rows, k / 2});
  }
  const bool swizzled = check_layout(op, name, layout);
  const int64_t scale_rows = swizzled ? rounded_up(rows, 128) : rows;
  const int64_t scale_cols = swizzled ? rounded_up(k / 16, 4) : k / 16;
  if (stack) {
    check_shape(op, scale_name.c_str(), scale, {count, scale_rows, scale_cols});
  } else {
    check_shape(op, scale_name.c_str(), scale, {scale_rows, scale_cols});
  }
  return {nullptr, nullptr, nullptr, swizzled, false};
}

// Whether there is one global scale per row.
inline bool check_global(const char* op, const char* name, const Tensor& global, int64_t rows) {
  const std::string global_name = std::string(name) + "_global";
  check_dtype(op, global_name.c_str(), global, ScalarType::Float);
  const bool one = global.numel() == 1;
  N3_CHECK(op, one || (global.dim() == 1 && global.size(0) == rows), global_name,
           " must have 1 element or one per row of ", name, " (", rows, "), got ", global.numel());
  return !one;
}

// Each checks one call, for CPU and CUDA alike; returns the problem with null pointers.
inline Params check_operands(const char* op, const Tensor& a, const Tensor& a_scale, const Tensor& a_global,
                             const Tensor& b, const Tensor& b_scale, const Tensor& b_global,
                             const OptionalTensor& bias, ScalarType out_dtype, const std::string& a_layout,
                             const std::string& b_layout) {
  const int64_t k = check_k(op, a);
  check_dim(op, "b", b, 2);
  const int64_t m = a.size(0), n = b.size(0);
  Matrix a_matrix = check_matrix(op, "a", a, a_scale, a_layout, 1, m, k);
  Matrix b_matrix = check_matrix(op, "b", b, b_scale, b_layout, 1, n, k);
  a_matrix.global_per_row = check_global(op, "a", a_global, m);
  b_matrix.global_per_row = check_global(op, "b", b_global, n);
  check_floating(op, "out_dtype", out_dtype);
  if (bias) {
    N3_CHECK(op, bias->scalar_type() == out_dtype, "bias must be ", dtype_name(out_dtype), ", got ",
             dtype_name(bias->scalar_type()));
    check_shape(op, "bias", *bias, {n});
  }
  check_same_device(op, "a_scale", a_scale, "a", a);
  check_same_device(op, "a_global", a_global, "a", a);
  check_same_device(op, "b", b, "a", a);
  check_same_device(op, "b_scale", b_scale, "a", a);
  check_same_device(op, "b_global", b_global, "a", a);
  if (bias) check_same_device(op, "bias", *bias, "a", a);
  return {a_matrix, b_matrix, nullptr, nullptr, nullptr, m, n, k, 1, out_dtype};
}

inline Params check(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                    const Tensor& b_scale, const Tensor& b_global, const OptionalTensor& bias, ScalarType out_dtype,
                    const std::string& a_layout, const std::string& b_layout) {
  return check_operands("nvfp4_gemm", a, a_scale, a_global, b, b_scale, b_global, bias, out_dtype, a_layout, b_layout);
}

inline Params check_grouped(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                            const Tensor& b_scale, const Tensor& b_global, const Tensor& offsets,
                            ScalarType out_dtype, const std::string& b_layout) {
  constexpr const char* op = "nvfp4_grouped_gemm";
  const int64_t k = check_k(op, a);
  check_dim(op, "b", b, 3);
  const int64_t m = a.size(0), experts = b.size(0), n = b.size(1);
  Matrix a_matrix = check_matrix(op, "a", a, a_scale, "linear", 1, m, k);
  Matrix b_matrix = check_matrix(op, "b", b, b_scale, b_layout, experts, n, k);
  a_matrix.global_per_row = check_global(op, "a", a_global, m);
  check_dtype(op, "b_global", b_global, ScalarType::Float);
  check_shape(op, "b_global", b_global, {experts});
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check_shape(op, "offsets", offsets, {experts + 1});
  check_floating(op, "out_dtype", out_dtype);
  check_same_device(op, "a_scale", a_scale, "a", a);
  check_same_device(op, "a_global", a_global, "a", a);
  check_same_device(op, "b", b, "a", a);
  check_same_device(op, "b_scale", b_scale, "a", a);
  check_same_device(op, "b_global", b_global, "a", a);
  check_same_device(op, "offsets", offsets, "a", a);
  return {a_matrix, b_matrix, nullptr, nullptr, nullptr, m, n, k, experts, out_dtype};
}

}  // namespace n3::nvfp4_gemm
