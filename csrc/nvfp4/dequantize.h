// nvfp4_dequantize: y = (e2m1 * e4m3) * global_scale. The product in brackets is exact in fp32; then one fp32 rounding,
// and one more to a 16-bit dtype. There is one global scale, or one for each index of the leading dimensions of q: for
// each matrix of a stack, for each row. A NaN scale byte (0x7f, 0xff) gives NaN, a negative one negates, code 8 is -0.
#pragma once
#include <string>

#include "../common/check.h"

namespace n3::nvfp4_dequantize {

constexpr const char* op = "nvfp4_dequantize";

struct Params {
  const uint8_t *q, *block_scale;
  const float* global_scale;  // of row r: global_scale[r / global_rows]
  void* y;                    // [rows, k]
  int64_t rows, k, global_rows;
  bool swizzled;
};

// Checks one call, for CPU and CUDA alike; returns the problem with null pointers.
inline Params check(const Tensor& q, const Tensor& block_scale, const Tensor& global_scale, ScalarType dtype,
                    const std::string& scale_layout) {
  check_dtype(op, "q", q, ScalarType::Byte);
  check_dtype(op, "block_scale", block_scale, ScalarType::Float8_e4m3fn);
  check_dtype(op, "global_scale", global_scale, ScalarType::Float);
  check_floating(op, "dtype", dtype);
  N3_CHECK(op, scale_layout == "linear" || scale_layout == "128x4", "scale_layout must be one of linear, 128x4, got ",
           scale_layout);
  N3_CHECK(op, q.dim() >= 1, "q must have at least 1 dimension, got 0");
  const int64_t bytes = q.size(-1);
  N3_CHECK(op, bytes % 8 == 0, "q must have a last dimension that is a multiple of 8, got ", bytes);
  const int64_t rows = bytes ? q.numel() / bytes : 0, ks = bytes / 8;
  const bool swizzled = scale_layout == "128x4";
  if (swizzled) {
    check_shape(op, "block_scale", block_scale, {(rows + 127) / 128 * 128, (ks + 3) / 4 * 4});
  } else {
    bool same = block_scale.dim() == q.dim() && block_scale.size(-1) == ks;
    for (int64_t i = 0; same && i + 1 < q.dim(); ++i) same = block_scale.size(i) == q.size(i);
    N3_CHECK(op, same, "block_scale must have the shape of q with a last dimension of ", ks, ", got ",
             shape_str(block_scale));
  }
  const int64_t globals = global_scale.numel(), dims = global_scale.dim();
  const bool leads = dims < q.dim() && global_scale.sizes() == q.sizes().slice(0, dims);
  N3_CHECK(op, globals == 1 || leads, "global_scale must have 1 element or the leading dimensions of q, got ",
           shape_str(global_scale));
  check_same_device(op, "block_scale", block_scale, "q", q);
  check_same_device(op, "global_scale", global_scale, "q", q);
  return {nullptr, nullptr, nullptr, nullptr, rows, bytes * 2, globals ? rows / globals : 0, swizzled};
}

}  // namespace n3::nvfp4_dequantize
