// The sm_90 kernel of grouped_linear under the emulator, with one C entry for tests/moe/test_grouped_cuda_kernel.py,
// which describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "moe/grouped_linear_sm90_kernel.cuh"

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

struct Call {
  int64_t m, rows, groups, n, k, multiprocessors;
  const void *x, *w;
  int64_t strides[2];  // of group and row of w, in elements
  const int32_t *offsets, *gather, *targets;
  const float* row_scale;
  void* y;
  int64_t sharing, half, activation, to, lazy, reversed;  // half: float16; lazy: 1 the products, 2 the copies as well
};

auto kernel_of(sm90::To to, bool half, bool gated) {
  using n3::device::BF16, n3::device::F16, sm90::To;
  if (to == To::kSlots) return sm90::tensor_grouped_kernel_sm90<BF16, false, To::kSlots>;
  return half ? gated ? sm90::tensor_grouped_kernel_sm90<F16, true, To::kRows>
                      : sm90::tensor_grouped_kernel_sm90<F16, false, To::kRows>
         : gated ? sm90::tensor_grouped_kernel_sm90<BF16, true, To::kRows>
                 : sm90::tensor_grouped_kernel_sm90<BF16, false, To::kRows>;
}

}  // namespace

extern "C" void emulate_grouped_linear(const Call* call) {
  const Call& c = *call;
  emulator::lazy_products = c.lazy > 0;
  emulator::lazy_copies = c.lazy > 1;
  const auto activation = static_cast<n3::grouped_linear::Activation>(c.activation);
  const bool gated = n3::grouped_linear::is_gated(activation);
  const int64_t outputs = gated ? c.n / 2 : c.n;
  const sm90::Plan plan = sm90::plan(c.rows, c.groups, outputs, sm90::kOutputs / (gated ? 2 : 1), sm90::Dense::kRows,
                                     c.multiprocessors);
  const emulator::TensorMap map{static_cast<const char*>(c.w),
                                {c.k, c.n, c.groups, 1},
                                {2, 2 * c.strides[1], 2 * c.strides[0], 2 * c.strides[0]},
                                {64, 64, 1, 1},
                                128};
  const sm90::Problem p{{plan.work, c.x, c.offsets, c.gather, int32_t(c.sharing), int32_t(c.m), int32_t(c.rows),
                         int32_t(c.k)},
                        c.row_scale,
                        c.targets,
                        c.y,
                        int32_t(outputs),
                        activation};
  const auto kernel = kernel_of(static_cast<sm90::To>(c.to), c.half, gated);
  emulator::launch_hopper(plan.blocks, sm90::items::kThreads, c.reversed, [&] { kernel(map, p); });
}
