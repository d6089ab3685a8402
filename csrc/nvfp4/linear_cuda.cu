#include "linear.h"

#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "linear_kernel.cuh"

// Set by n3kernels.batch_invariant(), for every kernel of this library that chooses by the number of rows.
extern "C" __attribute__((visibility("default"))) void n3_set_batch_invariant(bool on) { n3::batch_invariant() = on; }

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace linear = n3::nvfp4_linear;

template <typename T>
using KernelOf = void (*)(const T*, const uint8_t*, const uint8_t*, const float*, const T*, T*, int64_t, int64_t,
                          int64_t, bool);

template <typename T>
KernelOf<T> rows_kernel_for(int tokens) {
  switch (tokens) {
    case 1: return linear::rows_kernel<T, 1, linear::rows_per_warp(1)>;
    case 2: return linear::rows_kernel<T, 2, linear::rows_per_warp(2)>;
    case 4: return linear::rows_kernel<T, 4, linear::rows_per_warp(4)>;
    default: return linear::rows_kernel<T, 8, linear::rows_per_warp(8)>;
  }
}

template <typename T>
KernelOf<T> kernel_for(const linear::Plan& plan) {
  if (plan.kernel == linear::Kernel::kRows) return rows_kernel_for<T>(plan.tokens);
  if constexpr (std::is_same_v<T, float>) {
    return linear::fma_kernel;
  } else {
    switch (plan.kernel) {
      case linear::Kernel::kTensor16: return linear::tensor_kernel<T, linear::Tile16>;
      case linear::Kernel::kTensor64: return linear::tensor_kernel<T, linear::Tile64>;
      default: return linear::tensor_kernel<T, linear::Tile128>;
    }
  }
}

template <typename T>
void launch(const linear::Params& p, const linear::Plan& plan, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;  // a grid of 0 blocks is a launch error
  kernel_for<T>(plan)<<<plan.blocks, plan.threads, 0, stream>>>(
      static_cast<const T*>(p.x), p.q, p.block_scale, p.global_scale, static_cast<const T*>(p.bias),
      static_cast<T*>(p.y), p.m, p.n, p.k / 16, p.relu2);
  N3_CUDA_CHECK(linear::op, cudaGetLastError());
}

Tensor nvfp4_linear(const Tensor& x, const Tensor& q, const Tensor& block_scale, const Tensor& global_scale,
                    const std::optional<Tensor>& bias, const std::optional<std::string>& activation) {
  linear::Params p = linear::check(x, q, block_scale, global_scale, bias, activation);
  const n3::DeviceGuard guard(x.get_device_index());
  const Tensor xc = n3::aligned(x), qc = n3::aligned(q), sc = torch::stable::contiguous(block_scale);
  std::optional<Tensor> bc;
  if (bias) bc = torch::stable::contiguous(*bias);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.n;
  const Tensor y = torch::stable::new_empty(x, shape);
  p.x = xc.const_data_ptr();
  p.q = static_cast<const uint8_t*>(qc.const_data_ptr());
  p.block_scale = static_cast<const uint8_t*>(sc.const_data_ptr());
  p.global_scale = static_cast<const float*>(global_scale.const_data_ptr());
  p.bias = bc ? bc->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  const bool float32 = x.scalar_type() == ScalarType::Float;
  const linear::Plan plan = linear::plan(p.m, p.n, float32, n3::batch_invariant());
  const cudaStream_t stream = n3::current_stream(linear::op, x);
  switch (x.scalar_type()) {  // check() let nothing else through
    case ScalarType::Float: launch<float>(p, plan, stream); break;
    case ScalarType::Half: launch<n3::device::F16>(p, plan, stream); break;
    default: launch<n3::device::BF16>(p, plan, stream);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_linear", TORCH_BOX(&nvfp4_linear)); }
