// nvfp4_repack and the kernels of nvfp4_linear.packed under the emulator, with C entries for
// tests/nvfp4/test_linear_packed_kernels.py, which describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "nvfp4/linear_packed_dense_kernel.cuh"
#include "nvfp4/linear_packed_sm90_kernel.cuh"
#include "nvfp4/repack_kernel.cuh"

namespace emulator {
template <>
float to_float<n3::device::BF16>(uint16_t bits) {
  return n3::bf16_to_float(bits);
}
template <>
float to_float<n3::device::F16>(uint16_t bits) {
  return n3::half_to_float(bits);
}
}  // namespace emulator

namespace {

namespace packed = n3::nvfp4_linear_packed;

struct Call {
  int64_t m, n, k, kernel;  // kernel: -1 leaves the choice to the plan
  const void *x, *blob, *global_scale, *bias;
  void* y;
  int64_t half, relu2, invariant, lazy, reversed, capability;
};

// The launcher's way, its product a sum in double.
template <typename T>
void dense(const packed::Problem& p) {
  std::vector<T> weights(p.n * p.k);
  emulator::launch(n3::nvfp4_repack::row_tiles(p.n), packed::kDenseThreads, false,
                   [&] { packed::decode_blob_kernel<T>(p, weights.data()); });
  const T* x = static_cast<const T*>(p.x);
  for (int64_t m0 = 0, part = 3; m0 < p.m; m0 += part) {
    const int64_t rows = std::min(part, p.m - m0);
    std::vector<float> sums(rows * p.n);
    for (int64_t i = 0; i < rows * p.n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < p.k; ++j) {
        sum += double(n3::device::widen(x[(m0 + i / p.n) * p.k + j])) * n3::device::widen(weights[i % p.n * p.k + j]);
      }
      sums[i] = float(sum);
    }
    emulator::launch(packed::finish_blocks(rows, p.n), packed::kDenseThreads, false,
                     [&] { packed::finish_sums_kernel<T>(p, sums.data(), m0, rows); });
  }
}

template <typename T>
void run(const Call& c) {
  const packed::Cores cores = packed::cores_of(int(c.capability));
  packed::Plan plan = packed::plan(c.m, c.n, c.k, c.invariant != 0, cores);
  if (c.kernel >= 0) {
    const auto kernel = plan.kernel = packed::Kernel(c.kernel);
    if (packed::streams(kernel)) {
      plan = packed::stream_plan(kernel, c.m, c.n, c.k, c.invariant != 0, cores);
    } else if (kernel != packed::Kernel::kDense) {
      plan = packed::wide_plan(kernel, c.m, c.n);
    }
  }
  const packed::Problem p{c.x, static_cast<const uint8_t*>(c.blob), static_cast<const float*>(c.global_scale), c.bias,
                        c.y, c.m, c.n, c.k, plan.splits, plan.row_groups, c.relu2 != 0};
  if (plan.kernel == packed::Kernel::kDense) return dense<T>(p);
  if (packed::streams(plan.kernel)) {
    packed::with_stream(plan.kernel, [&](auto* type) {
      using Shape = std::remove_pointer_t<decltype(type)>;
      const auto body = [&] { packed::tensor_stream_kernel<T, Shape>(p); };
      emulator::launch_hopper(plan.blocks, plan.threads, c.reversed, body, plan.splits);
    });
    return;
  }
  packed::with_wide(plan.kernel, [&](auto* type) {
    using Shape = std::remove_pointer_t<decltype(type)>;
    const emulator::TensorMap map{static_cast<const char*>(c.x), {c.k, c.m, 1, 1}, {2, 2 * c.k, 2 * c.k, 2 * c.k},
                                  {64, Shape::kTokens, 1, 1}, 128};
    const auto body = [&] { packed::tensor_wide_kernel_sm90<T, Shape>(map, p); };
    emulator::launch_hopper(plan.blocks, plan.threads, c.reversed, body);
  });
}

}  // namespace

extern "C" void emulate_linear_packed(const Call* call) {
  emulator::lazy_products = call->lazy > 0;
  emulator::lazy_copies = call->lazy > 1;
  call->half ? run<n3::device::F16>(*call) : run<n3::device::BF16>(*call);
}

extern "C" void emulate_repack(const uint8_t* q, const uint8_t* scale, uint8_t* blob, int64_t n, int64_t k,
                               bool reversed) {
  namespace repack = n3::nvfp4_repack;
  emulator::launch(repack::row_tiles(n), repack::kThreads, reversed,
                   [&] { repack::repack_kernel(repack::Weights{q, scale, n, k}, blob); });
}
