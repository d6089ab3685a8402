// The experts on NVFP4 weights. Slots are sorted by expert, so that an expert's weights are read once for its tokens,
// and the products are those of nvfp4_linear, whose sums do not depend on the number of tokens. Every slot's output is
// kept as a row of floats: a token's sum then runs over its slots in their order, whatever the order of the experts.
#include "experts.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/cpu.h"
#include "../common/threads.h"
#include "../nvfp4/linear_engine.h"

namespace {

namespace linear = n3::nvfp4_linear;
using n3::buffer;
using n3::Buffer;
using n3::for_items;
using n3::moe_experts::Activation;
using n3::moe_experts::op;
using n3::moe_experts::OptionalTensor;
using n3::moe_experts::Params;
using n3::moe_experts::Weights;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowFloats = int64_t(1) << 25;  // most floats of slot outputs kept at a time: 128 MiB
constexpr int64_t kGroupSlots = 1024;             // slots whose inputs and intermediates are kept at a time, about
constexpr int64_t kCopyWork = 8;                  // multiply-adds in the time of converting or adding one float

// ---- sorting

// Slots order[begin .. begin + size) of one expert.
struct Batch {
  int64_t expert, begin, size;
};

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

Sorted sort_slots(const Params& p, const Tokens& tokens) {
  const int64_t slots = tokens.count * p.top_k, slot0 = tokens.first * p.top_k;
  std::vector<int64_t> starts(p.experts + 1);  // of each expert in `order`, then the place of its next slot
  for (int64_t s = 0; s < slots; ++s) ++starts[expert_of(p, slot0 + s) + 1];
  starts[0] = 0;  // the skipped
  for (int64_t e = 0; e < p.experts; ++e) starts[e + 1] += starts[e];
  Sorted sorted{std::vector<int64_t>(starts[p.experts]), {}};
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t n = starts[e + 1] - starts[e], parts = (n + linear::kTokens - 1) / linear::kTokens;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = n * i / parts;
      sorted.batches.push_back({e, starts[e] + begin, n * (i + 1) / parts - begin});
    }
  }
  for (int64_t s = 0; s < slots; ++s) {
    if (const int64_t e = expert_of(p, slot0 + s); e >= 0) sorted.order[starts[e]++] = s;
  }
  return sorted;
}

// ---- products

// A tile of tokens or a panel of weight rows of a batch.
struct Item {
  const Batch* batch;
  int64_t begin, size;
};

int64_t slots_of(std::span<const Batch> batches) {
  return batches.back().begin + batches.back().size - batches.front().begin;
}

// Calls read(position, row) for every slot of the batches and packs the row of w.k floats as the kernel wants it.
template <typename Read>
Buffer<float> pack(const linear::Kernels& kernel, int64_t k, std::span<const Batch> batches, const Read& read) {
  std::vector<Item> items;
  for (const Batch& batch : batches) {
    const linear::Tiles tiles{batch.size};
    for (int64_t i = 0; i < tiles.count(); ++i) {
      items.push_back({&batch, tiles.begin(i), tiles.begin(i + 1) - tiles.begin(i)});
    }
  }
  const int64_t floats = linear::packed_floats(k), slots = slots_of(batches), n = int64_t(items.size());
  auto packed = buffer<float>(slots * floats * 4);
  for_items(n, slots * floats * kCopyWork, [&](const auto& take) {
    const auto row = buffer<float>(k * 4);
    for (int64_t i = take(); i < n; i = take()) {
      const int64_t begin = items[i].batch->begin + items[i].begin;
      float* tile = packed.get() + (begin - batches[0].begin) * floats;
      for (int64_t t = 0; t < items[i].size; ++t) {
        read(begin + t, row.get());
        kernel.pack(row.get(), k, items[i].size, t, tile);
      }
    }
  });
  return packed;
}

// Calls write(position, n, sums, count, factor): outputs n .. n + count of that slot are sums * factor. One item is a
// panel of weight rows, so an output has one owner and its bits do not depend on the threads.
template <typename Write>
void multiply(const linear::Kernels& kernel, const Weights& w, std::span<const Batch> batches, const float* packed,
              const Write& write) {
  std::vector<Item> items;
  int64_t scratch_bytes = 0, sum_floats = 0;
  for (const Batch& batch : batches) {
    const int64_t rows = kernel.panel_rows(w.k, batch.size);
    for (int64_t n = 0; n < w.n; n += rows) items.push_back({&batch, n, std::min(rows, w.n - n)});
    scratch_bytes = std::max(scratch_bytes, kernel.scratch_bytes(w.k, batch.size));
    sum_floats = std::max(sum_floats, rows * batch.size);
  }
  const int64_t count = int64_t(items.size()), floats = linear::packed_floats(w.k);
  for_items(count, slots_of(batches) * w.n * w.k, [&](const auto& take) {
    const auto scratch = buffer<char>(scratch_bytes);
    const auto sums = buffer<float>(sum_floats * 4);
    for (int64_t i = take(); i < count; i = take()) {
      const auto [batch, n, rows] = items[i];
      const linear::GlobalScale global = linear::split_global_scale(kernel, w.global_scale[batch->expert]);
      const int64_t row = batch->expert * w.n + n;
      const linear::Panel panel{static_cast<const uint8_t*>(w.w) + row * (w.k / 2), w.block_scale + row * (w.k / 16),
                                rows, w.k};
      const float* x = packed + (batch->begin - batches[0].begin) * floats;
      kernel.sums(global.table, panel, x, batch->size, scratch.get(), sums.get());
      for (int64_t t = 0; t < batch->size; ++t) {
        write(batch->begin + t, n, sums.get() + t * rows, rows, global.factor);
      }
    }
  });
}

float act(Activation activation, float v) {
  switch (activation) {
    case Activation::kSilu: return v / (1.f + std::exp(-v));
    case Activation::kGelu: return 0.5f * v * std::erfc(v * -0.70710678118654752f);
    case Activation::kRelu2: break;
  }
  return v < 0.f ? 0.f : v * v;  // NaN stays
}

void activate(const Params& p, const float* h, float* out) {
  for (int64_t i = 0; i < p.inner; ++i) out[i] = act(p.activation, h[i]);
  if (p.activation == Activation::kRelu2) return;
  for (int64_t i = 0; i < p.inner; ++i) out[i] *= h[p.inner + i];
}

// rows[slot] = W_down act(W_up x) for the slots of some batches.
template <typename T>
void run_group(const Params& p, const Tokens& tokens, const Sorted& sorted, std::span<const Batch> batches,
               float* rows) {
  const linear::Kernels& kernel = linear::kernels();
  const int64_t position0 = batches[0].begin;
  const auto hidden = buffer<float>(slots_of(batches) * p.up.n * 4);
  const auto hidden_of = [&](int64_t position) { return hidden.get() + (position - position0) * p.up.n; };

  const auto read_x = [&](int64_t position, float* row) {
    const T* x = static_cast<const T*>(p.x) + (tokens.first + sorted.order[position] / p.top_k) * p.width;
    for (int64_t i = 0; i < p.width; ++i) row[i] = n3::to_float(x[i]);
  };
  const auto write_hidden = [&](int64_t position, int64_t n, const float* sums, int64_t count, float factor) {
    float* to = hidden_of(position) + n;
    for (int64_t i = 0; i < count; ++i) to[i] = sums[i] * factor;
  };
  multiply(kernel, p.up, batches, pack(kernel, p.width, batches, read_x).get(), write_hidden);

  const auto read_hidden = [&](int64_t position, float* row) { activate(p, hidden_of(position), row); };
  const auto write_row = [&](int64_t position, int64_t n, const float* sums, int64_t count, float factor) {
    float* to = rows + sorted.order[position] * p.width + n;
    for (int64_t i = 0; i < count; ++i) to[i] = sums[i] * factor;
  };
  multiply(kernel, p.down, batches, pack(kernel, p.inner, batches, read_hidden).get(), write_row);
}

// ---- the whole

template <typename T>
void combine(const Params& p, const Tokens& tokens, const float* rows) {
  for_items(tokens.count, tokens.count * p.top_k * p.width * kCopyWork, [&](const auto& take) {
    const auto sum = buffer<float>(p.width * 4);
    for (int64_t t = take(); t < tokens.count; t = take()) {
      std::fill_n(sum.get(), p.width, 0.f);
      for (int64_t j = 0; j < p.top_k; ++j) {
        const int64_t slot = (tokens.first + t) * p.top_k + j;
        if (expert_of(p, slot) < 0) continue;
        const float weight = p.weights[slot], *row = rows + (t * p.top_k + j) * p.width;
        for (int64_t i = 0; i < p.width; ++i) sum[i] += weight * row[i];
      }
      T* y = static_cast<T*>(p.y) + (tokens.first + t) * p.width;
      for (int64_t i = 0; i < p.width; ++i) y[i] = n3::from_float<T>(sum[i]);
    }
  });
}

template <typename T>
void run(const Params& p) {
  const int64_t most = std::clamp<int64_t>(kRowFloats / (p.top_k * p.width), 1, p.tokens);
  const auto rows = buffer<float>(most * p.top_k * p.width * 4);
  for (int64_t first = 0; first < p.tokens; first += most) {
    const Tokens tokens{first, std::min(most, p.tokens - first)};
    const Sorted sorted = sort_slots(p, tokens);
    const std::span<const Batch> batches = sorted.batches;
    for (size_t begin = 0, end = 0; begin < batches.size(); begin = end) {
      for (int64_t slots = 0; end < batches.size() && slots < kGroupSlots; ++end) slots += batches[end].size;
      run_group<T>(p, tokens, sorted, batches.subspan(begin, end - begin), rows.get());
    }
    combine<T>(p, tokens, rows.get());
  }
}

Tensor moe_experts(const Tensor& x, const Tensor& w_up, const Tensor& w_down, const Tensor& ids, const Tensor& weights,
                   const OptionalTensor& up_scale, const OptionalTensor& up_global, const OptionalTensor& down_scale,
                   const OptionalTensor& down_global, const OptionalTensor& valid_tokens,
                   const std::string& activation, int64_t first_expert) {
  Params p = n3::moe_experts::check(x, w_up, w_down, ids, weights, up_scale, up_global, down_scale, down_global,
                                    valid_tokens, activation, first_expert);
  N3_CHECK(op, !p.dense, "dense weights are served by the reference");  // as the predicate in Python says before
  const Tensor y = torch::stable::new_empty(x, {p.tokens, p.width});
  if (p.tokens == 0) return y;
  std::vector<Tensor> alive;
  const auto data = [&](const Tensor& t) { return alive.emplace_back(torch::stable::contiguous(t)).const_data_ptr(); };
  const auto fill = [&](Weights& to, const Tensor& w, const Tensor& block_scale, const Tensor& global_scale) {
    to.w = data(w);
    to.block_scale = static_cast<const uint8_t*>(data(block_scale));
    to.global_scale = static_cast<const float*>(data(global_scale));
  };
  fill(p.up, w_up, *up_scale, *up_global);
  fill(p.down, w_down, *down_scale, *down_global);
  p.x = data(x);
  p.ids = static_cast<const int32_t*>(data(ids));
  p.weights = static_cast<const float*>(data(weights));
  p.valid_tokens = valid_tokens ? static_cast<const int32_t*>(data(*valid_tokens)) : nullptr;
  p.y = y.mutable_data_ptr();
  switch (x.scalar_type()) {  // check() let nothing else through
    case ScalarType::Float: run<float>(p); break;
    case ScalarType::Half: run<n3::Half>(p); break;
    default: run<n3::BFloat16>(p);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("moe_experts", TORCH_BOX(&moe_experts)); }
