// grouped_linear: rows that are read at all are listed group by group, multiplied, and finished in float32 while the
// sums of a panel are in the cache.
#include "grouped_linear.h"

#include <algorithm>
#include <span>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tile_products.h"

namespace {

namespace dense = n3::dense_linear;
using n3::Element;
using n3::grouped_linear::op;
using n3::grouped_linear::OptionalTensor;
using n3::grouped_linear::Params;
using n3::moe::Batch;
using torch::stable::Tensor;

struct Live {
  std::vector<int64_t> rows;  // ascending
  std::vector<Batch> batches;
};

// The rows that read something. The others are set to zero.
Live live_rows(const Params& p, int64_t row_bytes, int64_t most) {
  Live live;
  const auto clear = [&](int64_t begin, int64_t end) {
    std::fill_n(static_cast<char*>(p.y) + begin * row_bytes, (end - begin) * row_bytes, char(0));
  };
  clear(0, p.offsets[0]);
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t first = int64_t(live.rows.size());
    for (int64_t r = p.offsets[g]; r < p.offsets[g + 1]; ++r) {
      if (p.gather && p.gather[r] < 0) {
        clear(r, r + 1);
      } else {
        live.rows.push_back(r);
      }
    }
    n3::moe::add_batches(g, first, int64_t(live.rows.size()) - first, most, live.batches);
  }
  clear(p.offsets[p.groups], p.rows);
  return live;
}

dense::Activation activation_of(const Params& p) {
  switch (p.activation) {
    case n3::grouped_linear::Activation::kNone: break;
    case n3::grouped_linear::Activation::kRelu2: return dense::kRelu2;
    case n3::grouped_linear::Activation::kSilu: return dense::kSilu;
    case n3::grouped_linear::Activation::kGelu: return dense::kGelu;
  }
  return dense::kNone;
}

template <typename Product>
void run(const Params& p, Element element) {
  const dense::Kernels& kernels = dense::kernels();
  const dense::Activation activation = activation_of(p);
  const int64_t size = n3::element_size(element);
  const Product product({p.w, p.block_scale, p.global_scale, element, p.n, p.k});
  const Live live = live_rows(p, p.outputs * size, Product::kMostTokens);
  const auto x_of = [&](int64_t position) -> const void* {
    const int64_t r = live.rows[position];
    return static_cast<const char*>(p.x) + (p.gather ? p.gather[r] : r) * p.k * size;
  };
  const auto finish = [&](int64_t position, int64_t at, float* h, const float* value, int64_t n) {
    const int64_t r = live.rows[position];
    if (activation != dense::kNone) kernels.activate(activation, h, value, n, h);
    if (p.row_scale) {
      for (int64_t i = 0; i < n; ++i) h[i] *= p.row_scale[r];
    }
    kernels.narrow[element](h, n, static_cast<char*>(p.y) + (r * p.outputs + at) * size);
  };
  n3::moe::for_runs(live.batches, [&](std::span<const Batch> batches) {
    multiply(product, p.outputs < p.n, batches, product.inputs(batches, {element, false}, x_of), finish);
  });
}

Tensor grouped_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, const OptionalTensor& gather,
                      const OptionalTensor& row_scale, const OptionalTensor& block_scale,
                      const OptionalTensor& global_scale, const std::optional<std::string>& activation) {
  Params p = n3::grouped_linear::check(op, x, w, offsets, gather, row_scale, block_scale, global_scale, activation);
  std::vector<Tensor> alive;
  const auto data = [&](const Tensor& t) { return alive.emplace_back(torch::stable::contiguous(t)).const_data_ptr(); };
  p.offsets = static_cast<const int32_t*>(data(offsets));
  p.gather = gather ? static_cast<const int32_t*>(data(*gather)) : nullptr;
  n3::grouped_linear::check_values(op, p);
  const Tensor y = torch::stable::new_empty(x, {p.rows, p.outputs});
  if (p.rows == 0 || p.outputs == 0) return y;
  p.x = data(x), p.w = data(w);
  p.block_scale = block_scale ? static_cast<const uint8_t*>(data(*block_scale)) : nullptr;
  p.global_scale = global_scale ? static_cast<const float*>(data(*global_scale)) : nullptr;
  p.row_scale = row_scale ? static_cast<const float*>(data(*row_scale)) : nullptr;
  p.y = y.mutable_data_ptr();
  const Element element = n3::element_of(x.scalar_type());
  n3::moe::with_product(p.dense, element, [&]<typename Product>(Product*) { run<Product>(p, element); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("grouped_linear", TORCH_BOX(&grouped_linear)); }
