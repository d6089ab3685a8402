#include "embedding.h"

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/numerics.h"
#include "decode.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace embedding = n3::nvfp4_embedding;

template <typename Id, typename T>
void gather_rows(const embedding::Params& p) {
  const Id* ids = static_cast<const Id*>(p.ids);
  for (int64_t i = 0; i < p.count; ++i) {
    N3_CHECK(embedding::op, ids[i] >= 0 && ids[i] < p.n, "ids must lie in [0, ", p.n, "), got ", ids[i]);
  }
  const int64_t ks_total = p.k / 16;
  const float global = *p.global_scale;
  torch::stable::parallel_for(0, p.count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = int64_t(ids[i]) * ks_total;
      T* y = static_cast<T*>(p.y) + i * p.k;
      for (int64_t b = 0; b < ks_total; ++b) {
        const float scale = n3::e4m3_to_float(p.block_scale[from + b]);
        n3::decode_block(p.q + (from + b) * 8, scale, global, y + b * 16);
      }
    }
  });
}

template <typename Id>
void gather(const embedding::Params& p, ScalarType dtype) {
  switch (dtype) {  // check() let nothing else through
    case ScalarType::Float: return gather_rows<Id, float>(p);
    case ScalarType::Half: return gather_rows<Id, n3::Half>(p);
    default: return gather_rows<Id, n3::BFloat16>(p);
  }
}

Tensor nvfp4_embedding(const Tensor& ids, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
                       ScalarType dtype) {
  embedding::Params p = embedding::check(ids, q, block_scale, global_scale, dtype);
  const Tensor ic = torch::stable::contiguous(ids), qc = torch::stable::contiguous(q),
               sc = torch::stable::contiguous(block_scale);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(p.k);
  const Tensor y = torch::stable::new_empty(ids, shape, dtype);
  p.ids = ic.const_data_ptr();
  p.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  p.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  p.global_scale = static_cast<const float*>(global_scale.const_data_ptr());
  p.y = y.mutable_data_ptr();
  ids.scalar_type() == ScalarType::Int ? gather<int32_t>(p, dtype) : gather<int64_t>(p, dtype);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_embedding", TORCH_BOX(&nvfp4_embedding)); }
