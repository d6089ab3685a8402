#include "linear_call.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/cpu.h"
#include "linear_engine.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace linear = n3::nvfp4_linear;
using n3::buffer;

// x as float, tile after tile in the order of the kernel.
template <typename T>
void pack_tokens(const T* x, int64_t k, int64_t row, int64_t tokens, const linear::Kernels& kernel, float* packed) {
  const linear::Tiles tiles{tokens};
  torch::stable::parallel_for(0, tiles.count(), 2, [&](int64_t begin, int64_t end) {
    const auto floats = buffer<float>(k * 4);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t0 = tiles.begin(i), width = tiles.begin(i + 1) - t0;
      for (int64_t t = 0; t < width; ++t) {
        const T* from = x + (t0 + t) * k;
        for (int64_t j = 0; j < k; ++j) floats[j] = n3::to_float(from[j]);
        kernel.pack(floats.get(), k, width, t, packed + t0 * row);
      }
    }
  });
}

// y[token][n0 + r] of one panel from its sums.
template <typename T>
void finish(const linear::Params& p, float global, int64_t n0, int64_t rows, int64_t m0, int64_t tokens,
            const float* sums) {
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + n0 : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    T* y = static_cast<T*>(p.y) + (m0 + t) * p.n + n0;
    const float* sum = sums + t * rows;
    for (int64_t r = 0; r < rows; ++r) {
      float v = sum[r] * global;
      if (bias) v += n3::to_float(bias[r]);
      if (p.relu2) v = v < 0.f ? 0.f : v * v;
      y[r] = n3::from_float<T>(v);
    }
  }
}

// One task is a panel of weight rows, so an output has one owner and its bits do not depend on the threads.
template <typename T>
void run(const linear::Params& p) {
  const linear::Kernels& kernel = linear::kernels();
  const linear::GlobalScale global = linear::split_global_scale(kernel.decoding, *p.global_scale);
  const int64_t row = linear::packed_floats(p.k);
  const auto x = buffer<float>(std::min(p.m, linear::kTokens) * row * 4);
  for (int64_t m0 = 0; m0 < p.m; m0 += linear::kTokens) {
    const int64_t tokens = std::min(linear::kTokens, p.m - m0);
    pack_tokens(static_cast<const T*>(p.x) + m0 * p.k, p.k, row, tokens, kernel, x.get());
    const int64_t panel_rows = kernel.panel_rows(p.k, tokens), panels = (p.n + panel_rows - 1) / panel_rows;
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<char>(kernel.scratch_bytes(p.k, tokens));
      const auto sums = buffer<float>(panel_rows * tokens * 4);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n0 = i * panel_rows, rows = std::min(panel_rows, p.n - n0);
        const linear::Panel panel{p.q + n0 * (p.k / 2), p.block_scale + n0 * (p.k / 16), rows, p.k};
        kernel.sums(global.table, panel, x.get(), tokens, scratch.get(), sums.get());
        finish<T>(p, global.factor, n0, rows, m0, tokens, sums.get());
      }
    });
  }
}

// The same in tiles, for bfloat16.
void run_tiles(const linear::Params& p, const linear::amx::Kernels& kernel) {
  namespace amx = linear::amx;
  const linear::GlobalScale global = linear::split_global_scale(kernel.decoding, *p.global_scale);
  const int64_t most = amx::tokens_per_call(p.m, p.k), panels = (p.n + amx::kPanelRows - 1) / amx::kPanelRows;
  const auto x = buffer<char>(amx::tiles_of(most) * amx::tile_bytes(p.k, most));
  const auto* rows = static_cast<const n3::BFloat16*>(p.x);
  const auto* bias = static_cast<const n3::BFloat16*>(p.bias);
  for (int64_t m0 = 0; m0 < p.m; m0 += most) {
    const int64_t tokens = std::min(most, p.m - m0), tile_bytes = amx::tile_bytes(p.k, tokens);
    torch::stable::parallel_for(0, amx::tiles_of(tokens), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t0 = i * amx::kTileTokens, count = std::min(amx::kTileTokens, tokens - t0);
        const void* of[amx::kTileTokens];
        for (int64_t t = 0; t < count; ++t) of[t] = rows + (m0 + t0 + t) * p.k;
        kernel.pack(of, count, p.k, amx::tile_width(tokens), x.get() + i * tile_bytes);
      }
    });
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<char>(kernel.scratch_bytes(p.k, tokens));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n0 = i * amx::kPanelRows;
        const linear::Panel panel{p.q + n0 * (p.k / 2), p.block_scale + n0 * (p.k / 16),
                                  std::min(amx::kPanelRows, p.n - n0), p.k};
        n3::BFloat16* y = static_cast<n3::BFloat16*>(p.y) + m0 * p.n + n0;
        const amx::Outputs out{global.factor, bias ? bias + n0 : nullptr, p.relu2, y, p.n};
        kernel.product(global.table, panel, x.get(), tokens, scratch.get(), out);
      }
    });
  }
}

void run_bfloat16(const linear::Params& p) {
  const linear::amx::Kernels* tiles = linear::tile_kernels();
  tiles ? run_tiles(p, *tiles) : run<n3::BFloat16>(p);
}

Tensor nvfp4_linear(const Tensor& x, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
                    const std::optional<Tensor>& bias, const std::optional<std::string>& activation) {
  return linear::fill(linear::op, x, q, block_scale, global_scale, bias, activation, [&](const linear::Params& p) {
    switch (x.scalar_type()) {  // check() let nothing else through
      case ScalarType::Float: return run<float>(p);
      case ScalarType::Half: return run<n3::Half>(p);
      default: return run_bfloat16(p);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_linear", TORCH_BOX(&nvfp4_linear)); }
