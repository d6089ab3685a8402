#include "quantize.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/cpu.h"
#include "swizzle.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "quantize_lanes.h"

namespace n3::nvfp4_quantize {
const Kernels kGenericKernels = {amax, encode};
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace quantize = n3::nvfp4_quantize;
namespace swizzle = n3::nvfp4_swizzle;

const quantize::Kernels& kernels() {
#if defined(__x86_64__)
  switch (n3::cpu_isa()) {
    case n3::Isa::kAvx512: return quantize::kAvx512Kernels;
    case n3::Isa::kAvx2: return quantize::kAvx2Kernels;
    case n3::Isa::kGeneric: break;
  }
#endif
  return quantize::kGenericKernels;
}

constexpr int64_t kGrain = 2048;  // blocks: 32k elements, some 10 us

// A maximum does not depend on the order, so neither does anything on the number of threads.
float global_amax(const quantize::Params& p, quantize::Source source, int64_t block_bytes) {
  std::atomic<uint32_t> top{0};
  torch::stable::parallel_for(0, p.rows * p.k / 16, kGrain, [&](int64_t begin, int64_t end) {
    const void* x = static_cast<const char*>(p.x) + begin * block_bytes;
    const uint32_t mine = kernels().amax(x, source, end - begin);
    uint32_t seen = top.load();
    while (mine > seen && !top.compare_exchange_weak(seen, mine)) {
    }
  });
  return n3::bits_float(top.load());
}

quantize::Source source_of(ScalarType dtype) {
  switch (dtype) {  // check() let nothing else through
    case ScalarType::Float: return quantize::Source::kFloat;
    case ScalarType::Half: return quantize::Source::kHalf;
    default: return quantize::Source::kBFloat16;
  }
}

void quantize_blocks(const quantize::Params& p, quantize::Source source) {
  const int64_t block_bytes = source == quantize::Source::kFloat ? 64 : 32;
  float s_enc;
  if (p.global_scale) {
    s_enc = *p.global_scale == 0.f ? 1.f : std::fmin(1.f / *p.global_scale, FLT_MAX);
    *p.global_out = *p.global_scale;
  } else {
    const float amax = global_amax(p, source, block_bytes);
    s_enc = amax == 0.f ? 1.f : std::fmin((p.four_over_six ? 1536.f : 2688.f) / amax, FLT_MAX);
    *p.global_out = 1.f / s_enc;
  }
  if (s_enc == 0.f) s_enc = 1.f;
  torch::stable::parallel_for(0, p.rows * p.k / 16, kGrain, [&](int64_t begin, int64_t end) {
    const void* x = static_cast<const char*>(p.x) + begin * block_bytes;
    kernels().encode(x, source, end - begin, {s_enc, p.four_over_six}, p.q + begin * 8,
                     p.block_scale + begin);
  });
}

std::tuple<Tensor, Tensor, Tensor> nvfp4_quantize(const Tensor& x, const std::optional<Tensor>& global_scale,
                                                  const std::optional<Tensor>& hadamard,
                                                  const std::optional<Tensor>& seed, const std::string& rounding,
                                                  bool four_over_six, const std::string& block,
                                                  const std::string& scale_layout) {
  quantize::Params p = quantize::check(x, global_scale, hadamard, seed, rounding, four_over_six, block, scale_layout);
  const Tensor xc = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.k / 2;
  const Tensor q = torch::stable::new_empty(x, shape, ScalarType::Byte);
  shape.back() = p.k / 16;
  const Tensor linear_scale = torch::stable::new_empty(x, shape, ScalarType::Float8_e4m3fn);
  const Tensor global_out = torch::stable::new_empty(x, std::vector<int64_t>{}, ScalarType::Float);
  p.x = xc.const_data_ptr();
  p.global_scale = global_scale ? static_cast<const float*>(global_scale->const_data_ptr()) : nullptr;
  p.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  p.block_scale = static_cast<uint8_t*>(linear_scale.mutable_data_ptr());
  p.global_out = static_cast<float*>(global_out.mutable_data_ptr());
  quantize_blocks(p, source_of(x.scalar_type()));
  if (!p.swizzled) return {q, linear_scale, global_out};

  const std::vector<int64_t> tiles = {swizzle::padded_rows(p.rows), swizzle::padded_cols(p.k / 16)};
  const Tensor block_scale = torch::stable::new_empty(linear_scale, tiles);
  swizzle::swizzle_on_cpu({p.block_scale, static_cast<uint8_t*>(block_scale.mutable_data_ptr()), 1, p.rows, p.k / 16});
  return {q, block_scale, global_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_quantize", TORCH_BOX(&nvfp4_quantize)); }
