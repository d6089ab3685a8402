#include "repack.h"

#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace repack = n3::nvfp4_repack;

void pack_row_tile(const repack::Weights& w, int64_t row_tile, uint8_t* to) {
  uint8_t* marks = to + repack::depth_tiles(w.k) * repack::kTile;
  std::memset(marks, 0, repack::kMarks);
  for (int64_t tile = 0; tile < repack::depth_tiles(w.k); ++tile, to += repack::kTile) {
    for (int word = 0; word < 128; ++word) {
      const uint32_t codes = repack::packed_word(w, row_tile, tile, word);
      std::memcpy(to + 4 * word, &codes, 4);
    }
    for (int i = 0; i < repack::kScales; ++i) {
      const uint8_t scale = repack::packed_scale(w, row_tile, tile, i);
      to[repack::kCodes + i] = scale;
      if (scale == repack::kNaN) marks[i / 8 + i % 2 * 8] = 1;
    }
  }
}

Tensor nvfp4_repack(const Tensor& q, const Tensor& block_scale) {
  repack::Weights w = repack::check(q, block_scale);
  const Tensor qc = torch::stable::contiguous(q), sc = torch::stable::contiguous(block_scale);
  const int64_t rows = repack::row_tiles(w.n), bytes = repack::row_bytes(w.k);
  const Tensor blob = torch::stable::new_empty(q, {rows, bytes});
  w.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  w.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  auto* to = static_cast<uint8_t*>(blob.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_row_tile(w, i, to + i * bytes);
  });
  return blob;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_repack", TORCH_BOX(&nvfp4_repack)); }
