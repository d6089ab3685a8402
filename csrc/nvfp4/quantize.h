// nvfp4_quantize: e2m1 codes, one e4m3 scale per 16 elements (or per 16x16 tile), one fp32 global scale or one per row.
//
//   S_enc = min(2688 / amax, FLT_MAX), 1 if amax = 0       global = 1 / S_enc
//   scale = e4m3(block_amax * (S_enc * (1 / 6)))           code   = e2m1(x * min(1 / (scale * (1 / S_enc)), FLT_MAX))
//
// Every operation is one fp32 rounding, in this order (TransformerEngine's), so that all backends give the same bytes.
// Where the stored scale is 0 the codes are 0 too. amax is over finite elements; a block with a NaN or an infinity has
// scale NaN (0x7f) and codes 0, and nothing else in the tensor sees it. -0 keeps its sign (code 8).
//
// four_over_six: 1536 in place of 2688, base = block_amax / 6 * S_enc, and of the scales e4m3(base), e4m3(base * 1.5)
// the one with the smaller sum of |d| or d * d, d = ((code * scale) * amax) / 1536 - x with nearest codes, over
// k = 0..15 in order and over the rows of a tile as a tree (i + 8, i + 4, i + 2, i + 1); the first on a tie. amax is
// that of the tensor (the row), or 1536 * global_scale where that is given.
//
// hadamard: x becomes (x * signs) @ H16 / 4, a butterfly of strides 1, 2, 4, 8, rounded to the dtype of x, before all
// else. stochastic: with a = min(|x * enc|, 6) between the codes' values lower and upper the code is the lower one if
// word * 2^-32 >= (a - lower) / (upper - lower); the word is that of philox.h for the element's number.
#pragma once
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../common/check.h"
#include "quantize_form.h"

namespace n3::nvfp4_quantize {

constexpr const char* op = "nvfp4_quantize";

struct Params {
  const float* global_scale;  // null: computed from x
  const float* signs;         // [16]; null: no rotation
  const int64_t* seed;        // [2]: key, offset; null: nearest
  uint8_t* q;                 // [rows, k / 2]
  uint8_t* block_scale;       // [rows, k / 16], or [ceil128(rows), ceil4(k / 16)] in the 128x4 layout
  float* global_out;          // [globals]
  int64_t rows, k, globals;
  Form form;
  bool square;  // one scale per 16x16 tile
};

// The shape of x without its last dimension.
inline Sizes leading_shape(const Tensor& x) { return x.sizes().slice(0, x.dim() - 1); }

inline int64_t rows_of(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

// x as matrices; nothing where it cannot be read in place: contiguous() can.
inline std::optional<Matrices> matrices_of(const Tensor& x) {
  const int64_t last = x.dim() - 1, k = x.size(-1);
  Matrices m{x.const_data_ptr(), 1, 1, k, 0, k, x.stride(-1)};
  int64_t outer = last - 1;  // the dimension that comes next, from the inside
  if (m.k_stride != 1 && last > 0 && x.stride(-2) == 1) {
    m.rows = x.size(-2), m.row_stride = 1, m.batch_stride = 0;
    --outer;
  } else if (m.k_stride != 1) {
    return {};
  }
  // Dimensions go to the rows as long as one stride leads through them, then to the batches.
  bool has_rows = m.k_stride != 1, has_batches = false;
  for (; outer >= 0; --outer) {
    const int64_t size = x.size(outer), stride = x.stride(outer);
    if (size == 1) continue;
    if (!has_rows) {
      m.rows = size, m.row_stride = stride, has_rows = true;
    } else if (!has_batches && m.k_stride == 1 && stride == m.row_stride * m.rows) {
      m.rows *= size;
    } else if (!has_batches) {
      m.batches = size, m.batch_stride = stride, has_batches = true;
    } else if (stride == m.batch_stride * m.batches) {
      m.batches *= size;
    } else {
      return {};
    }
  }
  return m;
}

// ---- checks, for CPU and CUDA alike

// What every quantiser asks of what it quantises: rows of x that become rows of k elements.
inline Form check_form(const char* name, const Tensor& x, int64_t k, const std::optional<Tensor>& global_scale,
                       bool four_over_six, const std::string& metric, bool per_row, const std::string& scale_layout) {
  N3_CHECK(name, k % 16 == 0, "x must have a last dimension that is a multiple of 16, got ", k);
  if (global_scale) {
    check_dtype(name, "global_scale", *global_scale, ScalarType::Float);
    if (per_row) {
      check_shape(name, "global_scale", *global_scale, leading_shape(x));
    } else {
      N3_CHECK(name, global_scale->numel() == 1, "global_scale must have 1 element, got ", global_scale->numel());
    }
    check_same_device(name, "global_scale", *global_scale, "x", x);
  }
  N3_CHECK(name, metric == "mae" || metric == "mse", "metric must be one of mae, mse, got ", metric);
  N3_CHECK(name, scale_layout == "linear" || scale_layout == "128x4", "scale_layout must be one of linear, 128x4, got ",
           scale_layout);
  return {four_over_six, metric == "mse", per_row, scale_layout == "128x4"};
}

// The problem of rows of x that become rows of k elements, with null pointers.
inline Params params_of(const Tensor& x, int64_t k, Form form) {
  int64_t globals = 1;
  for (int64_t i = 0; form.per_row && i + 1 < x.dim(); ++i) globals *= x.size(i);
  return {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, rows_of(x), k, globals, form, false};
}

// Checks one call; returns the problem with null pointers.
inline Params check(const Tensor& x, const std::optional<Tensor>& global_scale, const std::optional<Tensor>& hadamard,
                    const std::optional<Tensor>& seed, const std::string& rounding, bool four_over_six,
                    const std::string& metric, const std::string& block, bool per_row,
                    const std::string& scale_layout) {
  check_floating(op, "x", x.scalar_type());
  N3_CHECK(op, x.dim() >= 1, "x must have at least 1 dimension, got 0");
  const Form form = check_form(op, x, x.size(-1), global_scale, four_over_six, metric, per_row, scale_layout);
  N3_CHECK(op, rounding == "nearest" || rounding == "stochastic", "rounding must be one of nearest, stochastic, got ",
           rounding);
  N3_CHECK(op, block == "1x16" || block == "16x16", "block must be one of 1x16, 16x16, got ", block);
  Params p = params_of(x, x.size(-1), form);
  p.square = block == "16x16";
  if (p.square) {
    const int64_t rows = x.dim() > 1 ? x.size(-2) : 1;
    N3_CHECK(op, rows % 16 == 0, "x must have rows in multiples of 16 for block=16x16, got ", rows);
    N3_CHECK(op, !per_row, "per_row must be False for block=16x16, got True");
  }
  if (hadamard) {
    check_dtype(op, "hadamard", *hadamard, ScalarType::Float);
    check_shape(op, "hadamard", *hadamard, {16});
  }
  N3_CHECK(op, rounding == "nearest" || seed, "seed must be given for rounding=stochastic, got None");
  if (seed) {
    check_dtype(op, "seed", *seed, ScalarType::Long);
    check_shape(op, "seed", *seed, {2});
  }
  if (hadamard) check_same_device(op, "hadamard", *hadamard, "x", x);
  if (seed) check_same_device(op, "seed", *seed, "x", x);
  return p;
}

// ---- outputs

using Parts = std::tuple<Tensor, Tensor, Tensor>;  // q, block_scale, global_scale

// Uninitialised, and the pointers to them in p; the Python twin is empty_parts in n3kernels/nvfp4/quantize.py.
inline Parts empty_parts(const Tensor& x, Params& p) {
  const Sizes lead = leading_shape(x);
  const Tensor global_scale = torch::stable::new_empty(x, p.form.per_row ? lead : Sizes(), ScalarType::Float);
  std::vector<int64_t> shape(lead.begin(), lead.end());
  shape.push_back(p.k / 2);
  const Tensor q = torch::stable::new_empty(x, shape, ScalarType::Byte);
  shape.back() = p.k / 16;
  if (p.form.swizzled) shape = {(p.rows + 127) / 128 * 128, (p.k / 16 + 3) / 4 * 4};
  const Tensor block_scale = torch::stable::new_empty(x, shape, ScalarType::Float8_e4m3fn);
  p.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  p.block_scale = static_cast<uint8_t*>(block_scale.mutable_data_ptr());
  p.global_out = static_cast<float*>(global_scale.mutable_data_ptr());
  return {q, block_scale, global_scale};
}

}  // namespace n3::nvfp4_quantize
