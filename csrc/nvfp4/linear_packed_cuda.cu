#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "linear_packed_dense_kernel.cuh"
#include "linear_packed_launch.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace packed = n3::nvfp4_linear_packed;
using n3::device::BF16;
using n3::device::F16;

template <typename T>
void stream_weights(const packed::Problem& p, const packed::Plan& plan, packed::Cores cores, cudaStream_t stream) {
  packed::with_stream(plan.kernel, [&](auto* type) {
    packed::launch(packed::tensor_stream_kernel<T, std::remove_pointer_t<decltype(type)>>, plan, cores, stream, p);
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
void dense(const packed::Problem& p, const Tensor& x, cudaStream_t stream) {
  const Tensor rows = torch::stable::reshape(x, {p.m, p.k}), weights = torch::stable::new_empty(x, {p.n, p.k});
  packed::decode_blob_kernel<T><<<uint32_t(n3::nvfp4_repack::row_tiles(p.n)), packed::kDenseThreads, 0, stream>>>(
      p, static_cast<T*>(weights.mutable_data_ptr()));
  N3_CUDA_CHECK(packed::op, cudaGetLastError());
  const Tensor columns = torch::stable::transpose(weights, 0, 1);
  const int64_t part = packed::dense_rows(p.n);
  for (int64_t m0 = 0; m0 < p.m; m0 += part) {
    const int64_t count = std::min(part, p.m - m0);
    Tensor these = rows;
    if (part < p.m) these = torch::stable::narrow(these, 0, m0, count);
    const Tensor sums = product(these, columns);
    packed::finish_sums_kernel<T><<<uint32_t(packed::finish_blocks(count, p.n)), packed::kDenseThreads, 0, stream>>>(
        p, static_cast<const float*>(sums.const_data_ptr()), m0, count);
    N3_CUDA_CHECK(packed::op, cudaGetLastError());
  }
}

packed::Cores cores_of(int device) {
  int major = 0, minor = 0;
  N3_CUDA_CHECK(packed::op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  N3_CUDA_CHECK(packed::op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  packed::Cores cores = packed::cores_of(10 * major + minor);
#if !defined(N3_HAS_SM90)
  cores.warpgroups = false;
#endif
  return cores;
}

template <typename T>
void run(const packed::Problem& p, const packed::Plan& plan, packed::Cores cores, const Tensor& x, cudaStream_t on) {
  if (plan.kernel == packed::Kernel::kDense) return dense<T>(p, x, on);
  if (packed::streams(plan.kernel)) return stream_weights<T>(p, plan, cores, on);
#if defined(N3_HAS_SM90)
  packed::launch_wide(p, plan, std::is_same_v<T, F16>, on);
#endif
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
  const packed::Cores cores = cores_of(x.get_device_index());
  const packed::Plan plan = packed::plan(m, n, k, n3::batch_invariant(), cores);
  const packed::Problem problem{xc.const_data_ptr(),
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
  const bool half = x.scalar_type() == ScalarType::Half;
  half ? run<F16>(problem, plan, cores, xc, stream) : run<BF16>(problem, plan, cores, xc, stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_linear.packed", TORCH_BOX(&nvfp4_linear_packed)); }
