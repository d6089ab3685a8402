#include "quantize.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "quantize_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace quantize = n3::nvfp4_quantize;

// Two launches where the global scale is computed: maxima of pieces, then every block reduces them for itself.
template <typename T>
void launch(const quantize::Params& p, const quantize::Plan& plan, uint32_t* partial, cudaStream_t stream) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t ks = p.k / 16;
  int partials = 0;
  if (!p.global_scale && plan.partials > 0) {
    partials = int(plan.partials);
    quantize::amax_kernel<T><<<partials, quantize::kThreads, 0, stream>>>(x, partial, p.rows * ks);
    N3_CUDA_CHECK(quantize::op, cudaGetLastError());
  }
  const auto kernel = p.four_over_six ? (p.swizzled ? quantize::quantize_kernel<T, true, true>
                                                    : quantize::quantize_kernel<T, true, false>)
                                      : (p.swizzled ? quantize::quantize_kernel<T, false, true>
                                                    : quantize::quantize_kernel<T, false, false>);
  // An empty tensor has a global scale too.
  const int64_t blocks = plan.blocks > 0 ? plan.blocks : 1;
  kernel<<<blocks, quantize::kThreads, 0, stream>>>(x, p.global_scale, partial, partials, p.q, p.block_scale,
                                                    p.global_out, p.rows, ks, plan.places);
  N3_CUDA_CHECK(quantize::op, cudaGetLastError());
}

std::tuple<Tensor, Tensor, Tensor> nvfp4_quantize(const Tensor& x, const std::optional<Tensor>& global_scale,
                                                  const std::optional<Tensor>& hadamard,
                                                  const std::optional<Tensor>& seed, const std::string& rounding,
                                                  bool four_over_six, const std::string& block,
                                                  const std::string& scale_layout) {
  quantize::Params p = quantize::check(x, global_scale, hadamard, seed, rounding, four_over_six, block, scale_layout);
  const n3::DeviceGuard guard(x.get_device_index());
  const quantize::Plan plan = quantize::plan(p.rows, p.k, p.swizzled);
  const Tensor xc = n3::aligned(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.k / 2;
  const Tensor q = torch::stable::new_empty(x, shape, ScalarType::Byte);
  shape.back() = p.k / 16;
  if (p.swizzled) {
    shape = {n3::nvfp4_swizzle::padded_rows(p.rows), n3::nvfp4_swizzle::padded_cols(p.k / 16)};
  }
  const Tensor block_scale = torch::stable::new_empty(x, shape, ScalarType::Float8_e4m3fn);
  const Tensor global_out = torch::stable::new_empty(x, std::vector<int64_t>{}, ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(x, std::vector<int64_t>{plan.partials}, ScalarType::Int);
  p.x = xc.const_data_ptr();
  p.global_scale = global_scale ? static_cast<const float*>(global_scale->const_data_ptr()) : nullptr;
  p.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  p.block_scale = static_cast<uint8_t*>(block_scale.mutable_data_ptr());
  p.global_out = static_cast<float*>(global_out.mutable_data_ptr());
  uint32_t* maxima = static_cast<uint32_t*>(partial.mutable_data_ptr());
  const cudaStream_t stream = n3::current_stream(quantize::op, x);
  switch (x.scalar_type()) {  // check() let nothing else through
    case ScalarType::Float: launch<float>(p, plan, maxima, stream); break;
    case ScalarType::Half: launch<n3::device::F16>(p, plan, maxima, stream); break;
    default: launch<n3::device::BF16>(p, plan, maxima, stream);
  }
  return {q, block_scale, global_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_quantize", TORCH_BOX(&nvfp4_quantize)); }
