// nvfp4_linear_fp8 on a CPU: the operands are rounded as tensor cores for 8-bit floats want them, and multiplied by the
// kernels of nvfp4_linear, which decode by tables: their order of summation is the one here, in float32 and in tiles.
//
//   sx = amax(|x|) / 448, 1 if that is 0    x8 = e4m3(x / sx)    y = act((sum x8 w8) * sx * (2^p * global) + bias)
//
// e4m3(code * s * 2^-p) is code * s rounded to 4 significant bits, whatever p is, unless it is subnormal, which takes
// a block scale below 2^(p - 5), a thousandth of the largest of its row. So one table serves almost every row; rows with
// such a block take the table of their p. The factor 2^p is in the tables; x8 and all their values are bfloat16 numbers.
#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/cpu.h"
#include "../common/element.h"
#include "../common/numerics.h"
#include "linear_call.h"
#include "linear_engine.h"
#define N3_LANES 4
#include "linear_fp8_lanes.h"

namespace n3::nvfp4_linear {

namespace fp8 {

const Kernels kGenericKernels = kKernels;

namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

}  // namespace
}  // namespace fp8

namespace {

constexpr const char* fp8_op = "nvfp4_linear_fp8";

// ---- weights

constexpr int kLeastExponent = -14, kMostExponent = 3;  // p of a row with block scales up to 2^-9, up to 448
constexpr int kAnyExponent = kMostExponent + 1;         // stands for the table of rows without subnormal weights

// The least p with 6 * largest <= 448 * 2^p.
int exponent_of(float largest) {
  int e;
  const float mantissa = std::frexp(largest, &e);  // in [0.5, 1)
  return largest == 0.f ? 0 : e - (mantissa > 7.f / 12.f ? 6 : 7);
}

// e4m3(v * 2^-p) * 2^p; v keeps 4 significant bits where p is any.
float folded(float v, int p) {
  if (v == 0.f || std::isnan(v)) return v;
  const int e = p == kAnyExponent ? std::ilogb(v) : p;
  return std::ldexp(e4m3_to_float(e4m3_from_float(std::ldexp(v, -e))), e);
}

// The decoding tables, made at their first use and kept.
class Tables {
 public:
  explicit Tables(const Decoding& decoding) : decoding_(decoding) {}

  const void* of(int p) {
    const int i = p - kLeastExponent;
    std::call_once(made_[i], [&] {
      const auto values = buffer<float[16]>(sizeof(Values));
      for (int s = 0; s < 256; ++s) {
        for (int c = 0; c < 16; ++c) {
          values[s][c] = folded(e2m1_to_float(uint8_t(c)) * e4m3_to_float(uint8_t(s)), p);
        }
      }
      tables_[i] = buffer<char>(decoding_.table_bytes);
      decoding_.prepare(reinterpret_cast<Values&>(*values.get()), tables_[i].get());
    });
    return tables_[i].get();
  }

 private:
  static constexpr int kCount = kAnyExponent - kLeastExponent + 1;
  const Decoding& decoding_;
  std::array<std::once_flag, kCount> made_;
  std::array<Buffer<char>, kCount> tables_;
};

// Which table a row of n block scales takes.
int table_of(const uint8_t* scale, int64_t n) {
  const fp8::Extremes seen = fp8::kernels().extremes(scale, n);
  if (seen.largest == 0) return kAnyExponent;
  const int p = exponent_of(e4m3_to_float(seen.largest));
  return e4m3_to_float(seen.least) >= std::ldexp(1.f, p - 5) ? kAnyExponent : p;
}

// body(table, first row, rows) for the runs of rows of a panel that share a table.
template <typename Body>
void for_runs(const Params& p, Tables& tables, int64_t n0, int64_t rows, const Body& body) {
  const int64_t ks = p.k / 16;
  for (int64_t first = 0; first < rows;) {
    const int table = table_of(p.block_scale + (n0 + first) * ks, ks);
    int64_t end = first + 1;
    while (end < rows && table_of(p.block_scale + (n0 + end) * ks, ks) == table) ++end;
    body(tables.of(table), n0 + first, end - first);
    first = end;
  }
}

// ---- results

// y[token][n0 + r] of tokens from m0 on, from sums[token * stride + r].
template <typename T>
void finish(const Params& p, const float* x_scale, int64_t n0, int64_t rows, int64_t m0, int64_t tokens,
            int64_t stride, const float* sums) {
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + n0 : nullptr;
  for (int64_t t = 0; t < tokens; ++t) {
    T* y = static_cast<T*>(p.y) + (m0 + t) * p.n + n0;
    for (int64_t r = 0; r < rows; ++r) {
      float v = sums[t * stride + r] * x_scale[t] * *p.global_scale;
      if (bias) v += to_float(bias[r]);
      if (p.relu2) v = v < 0.f ? 0.f : v * v;
      y[r] = from_float<T>(v);
    }
  }
}

// One task is a panel of weight rows, so an output has one owner and its bits do not depend on the threads.
template <typename T>
void run(const Params& p, Element element) {
  static Tables tables(kernels().decoding);
  const Kernels& kernel = kernels();
  const auto quantize = fp8::kernels().quantize_to_float[element];
  const int64_t row = packed_floats(p.k), most = std::min(p.m, kTokens);
  const auto x = buffer<float>(most * row * 4);
  std::vector<float> x_scale(most);
  for (int64_t m0 = 0; m0 < p.m; m0 += kTokens) {
    const int64_t tokens = std::min(kTokens, p.m - m0);
    const Tiles tiles{tokens};
    torch::stable::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
      const auto x8 = buffer<float>(p.k * 4);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t0 = tiles.begin(i), width = tiles.begin(i + 1) - t0;
        for (int64_t t = 0; t < width; ++t) {
          x_scale[t0 + t] = quantize(static_cast<const T*>(p.x) + (m0 + t0 + t) * p.k, p.k, x8.get());
          kernel.pack(x8.get(), p.k, width, t, x.get() + t0 * row);
        }
      }
    });
    const int64_t panel_rows = kernel.panel_rows(p.k, tokens), panels = (p.n + panel_rows - 1) / panel_rows;
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<char>(kernel.scratch_bytes(p.k, tokens));
      const auto sums = buffer<float>(panel_rows * tokens * 4);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * panel_rows;
        for_runs(p, tables, first, std::min(panel_rows, p.n - first), [&](const void* table, int64_t n0, int64_t rows) {
          const Panel panel{p.q + n0 * (p.k / 2), p.block_scale + n0 * (p.k / 16), rows, p.k};
          kernel.sums(table, panel, x.get(), tokens, scratch.get(), sums.get());
          finish<T>(p, x_scale.data(), n0, rows, m0, tokens, rows, sums.get());
        });
      }
    });
  }
}

// The same in tiles, for every dtype: x8 has few bits.
template <typename T>
void run_tiles(const Params& p, Element element, const amx::Kernels& kernel) {
  static Tables tables(kernel.decoding);
  const auto quantize = fp8::kernels().quantize_to_bfloat16[element];
  const int64_t most = amx::tokens_per_call(p.m, p.k), panels = (p.n + amx::kPanelRows - 1) / amx::kPanelRows;
  const auto x = buffer<char>(amx::tiles_of(most) * amx::tile_bytes(p.k, most));
  std::vector<float> x_scale(most);
  for (int64_t m0 = 0; m0 < p.m; m0 += most) {
    const int64_t tokens = std::min(most, p.m - m0), tile_bytes = amx::tile_bytes(p.k, tokens);
    torch::stable::parallel_for(0, amx::tiles_of(tokens), 1, [&](int64_t begin, int64_t end) {
      const auto x8 = buffer<BFloat16>(amx::kTileTokens * p.k * 2);
      const void* of[amx::kTileTokens];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t0 = i * amx::kTileTokens, count = std::min(amx::kTileTokens, tokens - t0);
        for (int64_t t = 0; t < count; ++t) {
          of[t] = x8.get() + t * p.k;
          x_scale[t0 + t] = quantize(static_cast<const T*>(p.x) + (m0 + t0 + t) * p.k, p.k, x8.get() + t * p.k);
        }
        kernel.pack(of, count, p.k, amx::tile_width(tokens), x.get() + i * tile_bytes);
      }
    });
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<char>(kernel.scratch_bytes(p.k, tokens));
      const auto sums = buffer<float>(amx::kPanelRows * tokens * 4);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * amx::kPanelRows, end_row = std::min(first + amx::kPanelRows, p.n);
        for_runs(p, tables, first, end_row - first, [&](const void* table, int64_t n0, int64_t rows) {
          const Panel panel{p.q + n0 * (p.k / 2), p.block_scale + n0 * (p.k / 16), rows, p.k};
          kernel.sums(table, panel, x.get(), tokens, scratch.get(), sums.get());
          finish<T>(p, x_scale.data(), n0, rows, m0, tokens, amx::kPanelRows, sums.get());
        });
      }
    });
  }
}

template <typename T>
void multiply(const Params& p, Element element) {
  const amx::Kernels* tiles = tile_kernels();
  tiles ? run_tiles<T>(p, element, *tiles) : run<T>(p, element);
}

Tensor nvfp4_linear_fp8(const Tensor& x, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
                        const std::optional<Tensor>& bias, const std::optional<std::string>& activation) {
  return fill(fp8_op, x, q, block_scale, global_scale, bias, activation, [&](const Params& p) {
    const Element element = element_of(x.scalar_type());
    switch (element) {
      case kFloat: return multiply<float>(p, element);
      case kHalf: return multiply<Half>(p, element);
      case kBFloat16: return multiply<BFloat16>(p, element);
    }
  });
}

}  // namespace
}  // namespace n3::nvfp4_linear

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("nvfp4_linear_fp8", TORCH_BOX(&n3::nvfp4_linear::nvfp4_linear_fp8));
}
