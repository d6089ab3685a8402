// The experts. Slots are sorted by expert, so that an expert's weights are read once for its tokens, and go through the
// up product, the activation and the down product a group of slots at a time, in float32. Every slot's output is kept
// as a row of floats: a token's sum then runs over its slots in their order, whatever the order of the experts.
#include "experts.h"

#include <algorithm>
#include <span>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/huge_pages.h"
#include "tile_products.h"

namespace {

namespace dense = n3::dense_linear;
using n3::buffer;
using n3::Element;
using n3::element_size;
using n3::for_items;
using n3::ScalarType;
using n3::moe::Batch;
using n3::moe::InTiles;
using n3::moe_experts::op;
using n3::moe_experts::OptionalTensor;
using n3::moe_experts::Params;
using torch::stable::Tensor;

constexpr int64_t kBatchesPerThread = 4;           // from here on a batch goes through both products on one thread
constexpr int64_t kRowFloats = int64_t(1) << 25;  // most floats of slot outputs kept at a time: 128 MiB

// ---- sorting

// Tokens first .. first + count, their slots numbered from 0.
struct Tokens {
  int64_t first, count;
};

// The local expert of a slot, or -1 where it is skipped.
int64_t expert_of(const Params& p, int64_t slot) {
  if (p.valid_tokens && slot / p.top_k >= *p.valid_tokens) return -1;
  const int64_t id = p.ids[slot];
  return id >= p.first_expert && id - p.first_expert < p.experts ? id - p.first_expert : -1;
}

struct Sorted {
  std::vector<int64_t> order;  // slots, expert by expert, ascending for each; skipped ones are left out
  std::vector<Batch> batches;
};

Sorted sort_slots(const Params& p, const Tokens& tokens, int64_t most) {
  const int64_t slots = tokens.count * p.top_k, slot0 = tokens.first * p.top_k;
  std::vector<int64_t> starts(p.experts + 1);  // of each expert in `order`, then the place of its next slot
  for (int64_t s = 0; s < slots; ++s) ++starts[expert_of(p, slot0 + s) + 1];
  starts[0] = 0;  // the skipped
  for (int64_t e = 0; e < p.experts; ++e) starts[e + 1] += starts[e];
  Sorted sorted{std::vector<int64_t>(starts[p.experts]), {}};
  for (int64_t e = 0; e < p.experts; ++e) {
    n3::moe::add_batches(e, starts[e], starts[e + 1] - starts[e], most, sorted.batches);
  }
  for (int64_t s = 0; s < slots; ++s) {
    if (const int64_t e = expert_of(p, slot0 + s); e >= 0) sorted.order[starts[e]++] = s;
  }
  return sorted;
}

// ---- the whole

dense::Activation activation_of(const Params& p) {
  switch (p.activation) {
    case n3::moe_experts::Activation::kRelu2: return dense::kRelu2;
    case n3::moe_experts::Activation::kSilu: return dense::kSilu;
    case n3::moe_experts::Activation::kGelu: break;
  }
  return dense::kGelu;
}

// The slots of some batches: rows[slot] = W_down act(W_up x).
struct Group {
  const Params& p;
  Element element;
  const Tokens& tokens;
  const Sorted& sorted;
  std::span<const Batch> batches;
  float* rows;

  const void* x_of(int64_t position) const {
    const int64_t token = tokens.first + sorted.order[position] / p.top_k;
    return static_cast<const char*>(p.x) + token * p.width * element_size(element);
  }
  float* row_of(int64_t position) const { return rows + sorted.order[position] * p.width; }
};

template <typename Product>
void run_group(const Group& g, const Product& up, const Product& down) {
  const Params& p = g.p;
  const dense::Kernels& kernels = dense::kernels();
  const dense::Activation activation = activation_of(p);
  const int64_t first = g.batches[0].begin, ld = dense::whole(p.inner, dense::kChains);
  const auto hidden = buffer<float>(n3::moe::positions_of(g.batches) * ld * 4);

  const auto x_of = [&](int64_t position) { return g.x_of(position); };
  const auto hidden_of = [&](int64_t position) { return hidden.get() + (position - first) * ld; };
  const auto keep_hidden = [&](int64_t position, int64_t r, const float* h, const float* value, int64_t n) {
    float* to = hidden_of(position) + r;
    kernels.activate(activation, h, value, n, to);
    if (r + n == p.inner) std::fill(to + n, hidden_of(position) + ld, 0.f);
  };
  const auto keep_row = [&](int64_t position, int64_t r, const float* h, const float*, int64_t n) {
    std::copy_n(h, n, g.row_of(position) + r);
  };
  const bool gated = activation != dense::kRelu2;
  multiply(up, gated, g.batches, up.inputs(g.batches, {g.element, false}, x_of), keep_hidden);
  multiply(down, false, g.batches, down.inputs(g.batches, {n3::kFloat, true}, hidden_of), keep_row);
}

template <typename Product>
void run_group(const Group& g, const InTiles<Product>& up, const InTiles<Product>& down) {
  const auto x_of = [&](int64_t position) { return g.x_of(position); };
  const auto x = n3::moe::pack_tiles(g.batches, g.p.width, up.tiles().pack(), x_of);
  const auto hidden = n3::moe::activated(up.tiles(), activation_of(g.p), g.p.inner, g.batches, x);
  n3::moe::rows_of(down.tiles(), g.batches, hidden, [&](int64_t position) { return g.row_of(position); });
}

// y of some tokens from their slots' rows.
void combine(const Params& p, const Tokens& tokens, const float* rows) {
  const dense::Kernels& kernels = dense::kernels();
  const Element element = n3::element_of(p.y_dtype);
  const int64_t width_bytes = p.width * element_size(element);
  for_items(tokens.count, tokens.count * p.top_k * p.width * n3::moe::kCopyWork, [&](const auto& take) {
    const auto sum = buffer<float>(p.width * 4);
    for (int64_t t = take(); t < tokens.count; t = take()) {
      std::fill_n(sum.get(), p.width, 0.f);
      for (int64_t j = 0; j < p.top_k; ++j) {
        const int64_t slot = (tokens.first + t) * p.top_k + j;
        if (expert_of(p, slot) < 0) continue;
        kernels.add(p.weights[slot], rows + (t * p.top_k + j) * p.width, p.width, sum.get());
      }
      kernels.narrow[element](sum.get(), p.width, static_cast<char*>(p.y) + (tokens.first + t) * width_bytes);
    }
  });
}

template <typename Product>
void run(const Params& p, Element element) {
  const auto weights = [&](const n3::moe_experts::Weights& w) {
    return n3::moe::Weights{w.w, w.block_scale, w.global_scale, element, w.n, w.k};
  };
  const Product up(weights(p.up)), down(weights(p.down));
  const int64_t most = std::clamp<int64_t>(kRowFloats / (p.top_k * std::max<int64_t>(p.width, 1)), 1, p.tokens);
  const int64_t row_bytes = most * p.top_k * p.width * 4;
  const auto rows = buffer<float>(row_bytes);
  n3::ask_for_huge_pages(rows.get(), row_bytes);
  for (int64_t first = 0; first < p.tokens; first += most) {
    const Tokens tokens{first, std::min(most, p.tokens - first)};
    const Sorted sorted = sort_slots(p, tokens, Product::kMostTokens);
    const auto run_some = [&](std::span<const Batch> batches) {
      run_group(Group{p, element, tokens, sorted, batches, rows.get()}, up, down);
    };
    const std::span<const Batch> batches = sorted.batches;
    const int64_t count = int64_t(batches.size());
    if (count < kBatchesPerThread * torch::stable::get_num_threads()) {
      n3::moe::for_runs(batches, run_some);
    } else {  // what lies between the products stays in a core's cache
      for_items(count, count * p.up.n * p.up.k, [&](const auto& take) {
        for (int64_t i = take(); i < count; i = take()) run_some(batches.subspan(i, 1));
      });
    }
    combine(p, tokens, rows.get());
  }
}

Tensor moe_experts(const Tensor& x, const Tensor& w_up, const Tensor& w_down, const Tensor& ids, const Tensor& weights,
                   const OptionalTensor& up_scale, const OptionalTensor& up_global, const OptionalTensor& down_scale,
                   const OptionalTensor& down_global, const OptionalTensor& valid_tokens,
                   const std::string& activation, int64_t first_expert, std::optional<ScalarType> out_dtype) {
  Params p = n3::moe_experts::check(x, w_up, w_down, ids, weights, up_scale, up_global, down_scale, down_global,
                                    valid_tokens, activation, first_expert, out_dtype);
  const Tensor y = torch::stable::new_empty(x, {p.tokens, p.width}, p.y_dtype);
  if (p.tokens == 0 || p.width == 0) return y;
  std::vector<Tensor> alive;
  const auto data = [&](const Tensor& t) { return alive.emplace_back(torch::stable::contiguous(t)).const_data_ptr(); };
  p.up.w = data(w_up), p.down.w = data(w_down);
  if (!p.dense) {
    p.up.block_scale = static_cast<const uint8_t*>(data(*up_scale));
    p.up.global_scale = static_cast<const float*>(data(*up_global));
    p.down.block_scale = static_cast<const uint8_t*>(data(*down_scale));
    p.down.global_scale = static_cast<const float*>(data(*down_global));
  }
  p.x = data(x);
  p.ids = static_cast<const int32_t*>(data(ids));
  p.weights = static_cast<const float*>(data(weights));
  p.valid_tokens = valid_tokens ? static_cast<const int32_t*>(data(*valid_tokens)) : nullptr;
  p.y = y.mutable_data_ptr();
  const Element element = n3::element_of(x.scalar_type());
  n3::moe::with_product(p.dense, element, [&]<typename Product>(Product*) { run<Product>(p, element); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("moe_experts", TORCH_BOX(&moe_experts)); }
