#include "swizzle.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/numerics.h"

// One task is 128 rows of one matrix: a row of tiles. Four neighbouring scales stay together, so words move.
void n3::nvfp4_swizzle::swizzle_on_cpu(const Params& p) {
  const int64_t tile_rows = padded_rows(p.rows) / 128, bytes = 128 * padded_cols(p.cols);
  torch::stable::parallel_for(0, p.batch * tile_rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t r0 = t % tile_rows * 128;
      const uint8_t* in = p.in + (t / tile_rows * p.rows + r0) * p.cols;
      uint8_t* out = p.out + t * bytes;
      std::fill_n(out, bytes, uint8_t(0));
      for (int64_t r = 0; r < std::min<int64_t>(128, p.rows - r0); ++r) {
        const uint8_t* row = in + r * p.cols;
        int64_t ks = 0;
        for (; ks + 4 <= p.cols; ks += 4) std::memcpy(out + scale_128x4(r, ks, p.cols), row + ks, 4);
        for (; ks < p.cols; ++ks) out[scale_128x4(r, ks, p.cols)] = row[ks];
      }
    }
  });
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace swizzle = n3::nvfp4_swizzle;

std::vector<int64_t> sizes(const Tensor& like, int64_t rows, int64_t cols) {
  if (like.dim() == 2) return {rows, cols};
  return {like.size(0), rows, cols};
}

void unswizzle_tiles(const swizzle::Params& p) {
  const int64_t matrix = swizzle::padded_rows(p.rows) * swizzle::padded_cols(p.cols);
  torch::stable::parallel_for(0, p.batch * p.rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i % p.rows;
      const uint8_t* in = p.in + i / p.rows * matrix;
      uint8_t* row = p.out + i * p.cols;
      int64_t ks = 0;
      for (; ks + 4 <= p.cols; ks += 4) std::memcpy(row + ks, in + n3::scale_128x4(r, ks, p.cols), 4);
      for (; ks < p.cols; ++ks) row[ks] = in[n3::scale_128x4(r, ks, p.cols)];
    }
  });
}

Tensor nvfp4_swizzle_scale(const Tensor& block_scale) {
  swizzle::Params p = swizzle::check_swizzle(block_scale);
  const Tensor in = torch::stable::contiguous(block_scale);
  const Tensor out =
      torch::stable::new_empty(in, sizes(in, swizzle::padded_rows(p.rows), swizzle::padded_cols(p.cols)));
  p.in = static_cast<const uint8_t*>(in.const_data_ptr());
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  swizzle::swizzle_on_cpu(p);
  return out;
}

Tensor nvfp4_unswizzle_scale(const Tensor& block_scale, int64_t rows, int64_t cols) {
  swizzle::Params p = swizzle::check_unswizzle(block_scale, rows, cols);
  const Tensor in = torch::stable::contiguous(block_scale);
  const Tensor out = torch::stable::new_empty(in, sizes(in, rows, cols));
  p.in = static_cast<const uint8_t*>(in.const_data_ptr());
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  unswizzle_tiles(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("nvfp4_swizzle_scale", TORCH_BOX(&nvfp4_swizzle_scale));
  m.impl("nvfp4_unswizzle_scale", TORCH_BOX(&nvfp4_unswizzle_scale));
}
