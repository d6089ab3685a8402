#include "dequantize.h"

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/numerics.h"
#include "decode.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace dequantize = n3::nvfp4_dequantize;

template <typename T>
void decode_rows(const dequantize::Params& p) {
  const int64_t ks_total = p.k / 16;
  torch::stable::parallel_for(0, p.rows * ks_total, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = b / ks_total;
      const int64_t s = p.swizzled ? n3::scale_128x4(row, b % ks_total, ks_total) : b;
      const float global = p.global_scale[row / p.global_rows];
      n3::decode_block(p.q + b * 8, n3::e4m3_to_float(p.block_scale[s]), global, static_cast<T*>(p.y) + b * 16);
    }
  });
}

Tensor nvfp4_dequantize(const Tensor& q, const Tensor& block_scale, const Tensor& global_scale, ScalarType dtype,
                        const std::string& scale_layout) {
  dequantize::Params p = dequantize::check(q, block_scale, global_scale, dtype, scale_layout);
  const Tensor qc = torch::stable::contiguous(q), sc = torch::stable::contiguous(block_scale);
  const Tensor gc = torch::stable::contiguous(global_scale);
  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  shape.back() = p.k;
  const Tensor y = torch::stable::new_empty(q, shape, dtype);
  p.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  p.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  p.global_scale = static_cast<const float*>(gc.const_data_ptr());
  p.y = y.mutable_data_ptr();
  switch (dtype) {  // check() let nothing else through
    case ScalarType::Float: decode_rows<float>(p); break;
    case ScalarType::Half: decode_rows<n3::Half>(p); break;
    default: decode_rows<n3::BFloat16>(p);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_dequantize", TORCH_BOX(&nvfp4_dequantize)); }
