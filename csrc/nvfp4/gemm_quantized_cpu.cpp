#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "gemm_batches.h"
#include "gemm_kernels.h"
#include "gemm_quantized.h"
#include "quantize_encoder.h"

namespace n3::nvfp4_gemm {
namespace {

constexpr int64_t kCodeTokens = 16;  // encoded at a time: the kernels take a block per vector lane
static_assert(nvfp4_linear::amx::kPanelRows <= kMaxRows && nvfp4_linear::amx::kPanelRows % 16 == 0);

}  // namespace

void finish_codes(const Params& p, const Panel& panel) {
  namespace quantize = nvfp4_quantize;
  const Scaled scaled(p, panel);
  const float* bias = static_cast<const float*>(p.bias);
  const quantize::Form form{};
  const quantize::Global global = quantize::given_global(*p.codes->global, form);
  const int64_t ks = p.n / 16, blocks = panel.rows / 16, c0 = panel.n0 / 16;
  uint8_t q[kCodeTokens * kMaxRows / 2], scale[kCodeTokens * kMaxRows / 16];
  const quantize::Encoding encoding{form, &global, nullptr, nullptr, q, scale};
  for (int64_t first = 0; first < panel.tokens.tokens; first += kCodeTokens) {
    const int64_t tokens = std::min(kCodeTokens, panel.tokens.tokens - first);
    float* const sums = panel.sums + first * panel.stride;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < panel.rows; ++r) {
        float v = scaled(sums[t * panel.stride + r], first + t, r);
        if (bias) v += bias[panel.n0 + r];
        const float positive = v < 0.f ? 0.f : v;  // keeps NaN
        sums[t * panel.stride + r] = p.codes->relu2 ? positive * positive : v;
      }
    }
    const quantize::Matrices y{sums, 1, tokens, panel.rows, 0, panel.stride, 1};
    quantize::kernels().encode[kFloat](y, encoding, 0, tokens * blocks);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t row = panel.tokens.first + first + t;
      std::memcpy(static_cast<uint8_t*>(p.y) + row * (p.n / 2) + panel.n0 / 2, q + t * panel.rows / 2, panel.rows / 2);
      for (int64_t c = 0; c < blocks; ++c) {
        const int64_t at = p.codes->swizzled ? scale_128x4(row, c0 + c, ks) : row * ks + c0 + c;
        p.codes->scale[at] = scale[t * blocks + c];
      }
    }
  }
}

namespace {

using Quantized = std::tuple<Tensor, Tensor>;  // q, block_scale

Quantized nvfp4_gemm_quantized(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                               const Tensor& b_scale, const Tensor& b_global, const Tensor& global_scale,
                               const OptionalTensor& bias, const std::optional<std::string>& activation,
                               const std::string& a_layout, const std::string& b_layout,
                               const std::string& scale_layout) {
  auto [p, codes] = check_quantized(a, a_scale, a_global, b, b_scale, b_global, global_scale, bias, activation,
                                    a_layout, b_layout, scale_layout);
  const Quantized out = quantized_outputs(a, p, codes);
  if (p.m == 0 || p.n == 0) return out;
  if (codes.swizzled) std::memset(codes.scale, 0, std::get<1>(out).numel());  // padding
  const Operand a_dense(a, a_scale, a_global, p.a), b_dense(b, b_scale, b_global, p.b);
  const nvfp4_quantize::Dense<float> bias_dense(bias);
  p.bias = bias_dense.data();
  codes.global = static_cast<const float*>(global_scale.const_data_ptr());
  p.codes = &codes;
  multiply(p, {{0, p.m, 0}});
  return out;
}

}  // namespace
}  // namespace n3::nvfp4_gemm

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("nvfp4_gemm.quantized", TORCH_BOX(&n3::nvfp4_gemm::nvfp4_gemm_quantized));
}
