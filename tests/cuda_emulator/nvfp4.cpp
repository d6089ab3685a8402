// The nvfp4 kernels but for the quantisers under the emulator, with C entries for tests/nvfp4/test_cuda_kernels.py. The
// grids are those of the plans; the pointers are the caller's, 16-byte aligned.
#include "cuda_emulator.h"

#include "nvfp4/dequantize_kernel.cuh"
#include "nvfp4/embedding_kernel.cuh"
#include "nvfp4/linear_kernel.cuh"
#include "nvfp4/swizzle_kernel.cuh"

namespace {

using n3::device::BF16;
using n3::device::F16;
namespace dequantize = n3::nvfp4_dequantize;
namespace embedding = n3::nvfp4_embedding;
namespace linear = n3::nvfp4_linear;
namespace swizzle = n3::nvfp4_swizzle;

// Calls f with a null pointer of the element type: 0 float32, 1 float16, 2 bfloat16.
template <typename F>
void with_type(int dtype, F f) {
  if (dtype == 0) return f(static_cast<float*>(nullptr));
  if (dtype == 1) return f(static_cast<F16*>(nullptr));
  return f(static_cast<BF16*>(nullptr));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

extern "C" {

void emulate_swizzle(const uint8_t* in, uint8_t* out, int64_t batch, int64_t rows, int64_t cols, bool inverse,
                     bool reversed) {
  const int64_t words = swizzle::words(batch, rows, cols, !inverse);
  emulator::launch(swizzle::blocks(words), swizzle::kThreads, reversed, [&] {
    inverse ? swizzle::swizzle_kernel<true>(in, out, words, rows, cols)
            : swizzle::swizzle_kernel<false>(in, out, words, rows, cols);
  });
}

void emulate_dequantize(int dtype, const uint8_t* q, const uint8_t* scale, const float* global, void* y, int64_t rows,
                        int64_t k, int64_t global_rows, bool swizzled) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t groups = rows * k / 16;
    const auto kernel = swizzled ? dequantize::dequantize_kernel<T, true> : dequantize::dequantize_kernel<T, false>;
    emulator::launch(ceil_div(groups, dequantize::kThreads), dequantize::kThreads, false,
                     [&] { kernel(q, scale, global, static_cast<T*>(y), groups, k / 16, global_rows * k / 16); });
  });
}

void emulate_embedding(int dtype, const int64_t* ids, const uint8_t* q, const uint8_t* scale, const float* global,
                       void* y, int64_t count, int64_t n, int64_t k) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t groups = count * k / 16;
    emulator::launch(ceil_div(groups, embedding::kThreads), embedding::kThreads, false, [&] {
      embedding::embedding_kernel<int64_t, T>(ids, q, scale, global, static_cast<T*>(y), groups, n, k / 16);
    });
  });
}

// `kernel` forces one of linear::Kernel; -1 leaves the choice to the plan.
void emulate_linear(int dtype, const void* x, const uint8_t* q, const uint8_t* scale, const float* global,
                    const void* bias, void* y, int64_t m, int64_t n, int64_t k, bool relu2, int kernel, bool reversed) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    linear::Plan plan = linear::plan(m, n, dtype == 0, false);
    switch (kernel < 0 ? linear::Kernel(-1) : linear::Kernel(kernel)) {
      case linear::Kernel::kTensor16: plan = linear::tensor_plan<linear::Tile16>(linear::Kernel(kernel), m, n); break;
      case linear::Kernel::kTensor64: plan = linear::tensor_plan<linear::Tile64>(linear::Kernel(kernel), m, n); break;
      case linear::Kernel::kTensor128: plan = linear::tensor_plan<linear::Tile128>(linear::Kernel(kernel), m, n); break;
      case linear::Kernel::kFma: plan = linear::plan(m, n, true, true); break;
      default: break;
    }
    const auto run = [&](auto f) {
      emulator::launch(plan.blocks, plan.threads, reversed, [&] {
        f(static_cast<const T*>(x), q, scale, global, static_cast<const T*>(bias), static_cast<T*>(y), m, n, k / 16,
          relu2);
      });
    };
    if (plan.kernel == linear::Kernel::kRows) {
      switch (plan.tokens) {
        case 1: return run(linear::rows_kernel<T, 1, linear::rows_per_warp(1)>);
        case 2: return run(linear::rows_kernel<T, 2, linear::rows_per_warp(2)>);
        case 4: return run(linear::rows_kernel<T, 4, linear::rows_per_warp(4)>);
        default: return run(linear::rows_kernel<T, 8, linear::rows_per_warp(8)>);
      }
    }
    if constexpr (std::is_same_v<T, float>) {
      run(linear::fma_kernel);
    } else {
      switch (plan.kernel) {
        case linear::Kernel::kTensor16: return run(linear::tensor_kernel<T, linear::Tile16>);
        case linear::Kernel::kTensor64: return run(linear::tensor_kernel<T, linear::Tile64>);
        default: return run(linear::tensor_kernel<T, linear::Tile128>);
      }
    }
  });
}

}  // extern "C"
