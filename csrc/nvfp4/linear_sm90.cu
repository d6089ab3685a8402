#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/tensor_map.h"
#include "linear_packed.h"
#include "linear_sm90_dense_kernel.cuh"
#include "linear_sm90_wide_kernel.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace packed = n3::nvfp4_linear_packed;
namespace sm90 = n3::nvfp4_linear::sm90;
using n3::device::BF16;
using n3::device::F16;

// A launch that may begin before the kernels before it end, in clusters.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const sm90::Plan& plan, cudaStream_t stream, const Arguments&... arguments) {
  N3_CUDA_CHECK(packed::op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = uint32_t(plan.splits);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(uint32_t(plan.blocks));
  config.blockDim = dim3(uint32_t(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = plan.splits > 1 ? 2 : 1;
  N3_CUDA_CHECK(packed::op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename T>
void stream(const sm90::Problem& p, const sm90::Plan& plan, cudaStream_t stream) {
  sm90::with_stream(plan.kernel, [&](auto* type) {
    launch(sm90::tensor_stream_sm90a_kernel<T, std::remove_pointer_t<decltype(type)>>, plan, stream, p);
  });
}

template <typename T>
void wide(const sm90::Problem& p, const sm90::Plan& plan, cudaStream_t stream) {
  sm90::with_wide(plan.kernel, [&](auto* type) {
    using Shape = std::remove_pointer_t<decltype(type)>;
    const ScalarType dtype = std::is_same_v<T, F16> ? ScalarType::Half : ScalarType::BFloat16;
    const CUtensorMap map =
        n3::tensor_map(packed::op, dtype, p.x, {p.k, p.m, 1, 1}, {p.k, 0, 0}, {64, Shape::kTokens, 1, 1});
    launch(sm90::tensor_wide_kernel_sm90<T, Shape>, plan, stream, map, p);
  });
}

// a [m, k] times b [k, n], summed and kept in float32.
Tensor product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(ScalarType::Float)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The weights decoded once, torch's product, and the end of the operator over parts of it that stay in L2.
template <typename T>
void dense(const sm90::Problem& p, const Tensor& x, cudaStream_t stream) {
  const Tensor rows = torch::stable::reshape(x, {p.m, p.k}), weights = torch::stable::new_empty(x, {p.n, p.k});
  sm90::decode_sm90a_kernel<T><<<uint32_t(n3::nvfp4_repack::row_tiles(p.n)), sm90::kDenseThreads, 0, stream>>>(
      p, static_cast<T*>(weights.mutable_data_ptr()));
  N3_CUDA_CHECK(packed::op, cudaGetLastError());
  const Tensor columns = torch::stable::transpose(weights, 0, 1);
  const int64_t part = sm90::dense_rows(p.n);
  for (int64_t m0 = 0; m0 < p.m; m0 += part) {
    const int64_t count = std::min(part, p.m - m0);
    Tensor these = rows;
    if (part < p.m) these = torch::stable::narrow(these, 0, m0, count);
    const Tensor sums = product(these, columns);
    sm90::finish_sm90a_kernel<T><<<uint32_t(sm90::finish_blocks(count, p.n)), sm90::kDenseThreads, 0, stream>>>(
        p, static_cast<const float*>(sums.const_data_ptr()), m0, count);
    N3_CUDA_CHECK(packed::op, cudaGetLastError());
  }
}

template <typename T>
void run(const sm90::Problem& p, const sm90::Plan& plan, const Tensor& x, cudaStream_t on) {
  if (plan.kernel == sm90::Kernel::kDense) {
    dense<T>(p, x, on);
  } else {
    sm90::streams(plan.kernel) ? stream<T>(p, plan, on) : wide<T>(p, plan, on);
  }
}

Tensor nvfp4_linear_packed(const Tensor& x, const Tensor& blob, const Tensor& global_scale, int64_t n,
                           const std::optional<Tensor>& bias, const std::optional<std::string>& activation) {
  const int64_t m = packed::check(x, blob, global_scale, n, bias, activation), k = x.size(-1);
  N3_CHECK(packed::op, x.scalar_type() != ScalarType::Float,
           "the CUDA kernel takes float16 and bfloat16 x, got float32: tensor cores would round it");
  const n3::DeviceGuard guard(x.get_device_index());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  const Tensor y = torch::stable::new_empty(x, shape);
  if (m == 0 || n == 0) return y;  // a grid of 0 blocks is a launch error
  const Tensor xc = n3::aligned(x), weights = n3::aligned(blob);
  std::optional<Tensor> shift;
  if (bias) shift = torch::stable::contiguous(*bias);
  const sm90::Plan plan = sm90::plan(m, n, k, n3::batch_invariant());
  const sm90::Problem problem{xc.const_data_ptr(),
                              static_cast<const uint8_t*>(weights.const_data_ptr()),
                              static_cast<const float*>(global_scale.const_data_ptr()),
                              shift ? shift->const_data_ptr() : nullptr,
                              y.mutable_data_ptr(),
                              m,
                              n,
                              k,
                              plan.splits,
                              plan.row_groups,
                              activation.has_value()};
  const cudaStream_t stream = n3::current_stream(packed::op, x);
  x.scalar_type() == ScalarType::Half ? run<F16>(problem, plan, xc, stream) : run<BF16>(problem, plan, xc, stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_linear.packed", TORCH_BOX(&nvfp4_linear_packed)); }
