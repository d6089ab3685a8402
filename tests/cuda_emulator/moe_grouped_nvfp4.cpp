// The sm_90 kernels of grouped_linear with NVFP4 weights under the emulator, with C entries for
// tests/moe/test_grouped_nvfp4_cuda_kernels.py, which describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "moe/grouped_nvfp4_sm90_kernel.cuh"
#include "moe/order_kernel.cuh"

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

namespace sm90 = n3::grouped_linear::sm90;
using sm90::To;

struct Call {
  int64_t m, rows, groups, n, k, multiprocessors;  // k: of the weights
  const void *x, *codes, *scales;
  const float* global;
  int64_t code_strides[2], scale_strides[2];  // of group and row, in bytes
  const int32_t *offsets, *gather, *targets;
  const float* row_scale;
  void* y;
  int64_t sharing, half, activation, to, tile_rows, lazy, reversed;  // lazy: 1 the products, 2 the copies as well
};

using n3::device::BF16, n3::device::F16;

template <typename T, bool kGated>
auto rows_kernel(int64_t rows) {
  return rows == 64 ? sm90::tensor_grouped_nvfp4_kernel_sm90<T, kGated, To::kRows, 64>
                    : sm90::tensor_grouped_nvfp4_kernel_sm90<T, kGated, To::kRows, 128>;
}

auto kernel_of(To to, bool half, bool gated, int64_t rows) {
  if (to == To::kSlots) return sm90::tensor_grouped_nvfp4_kernel_sm90<BF16, false, To::kSlots, 128>;
  if (to == To::kOrdered) {
    return gated ? sm90::tensor_grouped_nvfp4_kernel_sm90<BF16, true, To::kOrdered, 128>
                 : sm90::tensor_grouped_nvfp4_kernel_sm90<BF16, false, To::kOrdered, 128>;
  }
  return half ? gated ? rows_kernel<F16, true>(rows) : rows_kernel<F16, false>(rows)
              : gated ? rows_kernel<BF16, true>(rows) : rows_kernel<BF16, false>(rows);
}

}  // namespace

extern "C" void emulate_order(const uint16_t* x, uint16_t* to, int64_t rows, int64_t k) {
  const int64_t pieces = sm90::ordered(k) / sm90::kPiece, threads = sm90::nvfp4::kOrderThreads;
  emulator::launch((rows * pieces * 4 + threads - 1) / threads, int(threads), false,
                   [&] { sm90::nvfp4::order_kernel(x, to, rows, int32_t(k), int32_t(pieces)); });
}

// x is in order.
extern "C" void emulate_grouped_nvfp4(const Call* call) {
  const Call& c = *call;
  emulator::lazy_products = c.lazy > 0;
  emulator::lazy_copies = c.lazy > 1;
  const auto activation = static_cast<n3::grouped_linear::Activation>(c.activation);
  const bool gated = n3::grouped_linear::is_gated(activation);
  const int64_t outputs = gated ? c.n / 2 : c.n, pitch = c.code_strides[1] / 2;
  const sm90::Plan plan = sm90::plan(c.rows, c.groups, outputs, sm90::kOutputs / (gated ? 2 : 1), c.tile_rows,
                                     c.multiprocessors);
  const emulator::TensorMap map{static_cast<const char*>(c.codes),
                                {pitch + c.k / 4, c.n / 2, c.groups, 1},
                                {2, 4 * pitch, c.code_strides[0], c.code_strides[0]},
                                {32, 64, 1, 1},
                                64};
  const sm90::PackedProblem p{
      {plan.work, c.x, c.offsets, c.gather, int32_t(c.sharing), int32_t(c.m), int32_t(c.rows),
       int32_t(sm90::ordered(c.k))},
      {static_cast<const uint8_t*>(c.scales), c.scale_strides[0], c.scale_strides[1], c.global},
      c.row_scale,
      c.targets,
      c.y,
      int32_t(pitch),
      int32_t(c.k / 16),
      int32_t(outputs),
      activation};
  const auto kernel = kernel_of(static_cast<To>(c.to), c.half, gated, c.tile_rows);
  emulator::launch_hopper(plan.blocks, sm90::items::kThreads, c.reversed, [&] { kernel(map, p); });
}
